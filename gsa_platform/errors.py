"""Errors that tell the user what to type instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a command, configuration or plugin; names the choices. Exit code 2."""


def suggest(name: str, choices: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest choice, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(c) for c in choices], n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def unknown(what: str, name: str, choices: Iterable[str]) -> str:
    """Return the message for an unknown name: suggestion first, then every choice."""
    choices = sorted(choices)
    listed = ", ".join(choices) if choices else "(none)"
    return f"Unknown {what} '{name}'.{suggest(name, choices)}\n  Choices: {listed}"
