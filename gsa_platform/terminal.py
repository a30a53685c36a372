"""Lines for the person at the terminal, beside the output proper."""

from __future__ import annotations

import sys


def say(line: str) -> None:
    """Print a line to stderr at once."""
    print(line, file=sys.stderr, flush=True)
