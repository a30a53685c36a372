"""Lines for the person at the terminal, beside the output proper, and how a command ends."""

from __future__ import annotations

import os
import sys
import traceback

from gsa_platform.errors import UserError


def say(line: str) -> None:
    """Print a line to stderr at once."""
    print(line, file=sys.stderr, flush=True)


def print_failure(error: Exception) -> None:
    """A known failure in one message; anything unexpected with its traceback."""
    known = isinstance(error, UserError) or type(error).__name__ == "WorkerError"
    if known and not full_error():
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)


def full_error() -> bool:
    """Whether GSA_FULL_ERROR asks for the tracebacks of user errors."""
    return os.environ.get("GSA_FULL_ERROR", "") not in ("", "0")


def exit_code(error: SystemExit) -> int:
    """The exit code that the interpreter would make of it; a message is printed."""
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code
    print(error.code, file=sys.stderr)
    return 1
