"""``plugins check NAME``: run the contract kit on one component and print the report."""

from __future__ import annotations

import sys
from typing import Any

from omegaconf import OmegaConf

from gsa_platform import registry
from gsa_platform.components import SLOTS
from gsa_platform.errors import UserError, unknown

USAGE = (
    "Usage: gsa-platform plugins check NAME [--slot SLOT] [--verbose] [setting=value ...]\n"
    "  Settings are those of the component; plugins_path=FILE, indexer=NAME and other settings\n"
    "  of a run are taken too."
)


def check(arguments: list[str]) -> int:
    """Print the table; returns 0 if every check passed or was skipped, else 1."""
    names, settings, slot, verbose = _parse(arguments)
    slot, name = _find(names[0], slot)
    own, beside = {}, []
    for text in settings:
        key, _, value = text.partition("=")
        first, _, rest = key.partition(".")
        if key in SLOTS or (rest and first != slot):
            beside.append(text)
        else:
            own[rest or key] = _value(value)
    import torch

    from gsa_platform.testing.report import run_checks

    torch.set_num_threads(1)  # shapes this small only lose by more
    say = _progress if sys.stderr.isatty() else None
    report = run_checks(slot, name, own, beside, say=say)
    if say is not None:
        print("\r\033[K", end="", file=sys.stderr)
    print(report.table(verbose))
    return 1 if report.failed else 0


def _parse(arguments: list[str]) -> tuple[list[str], list[str], str, bool]:
    names: list[str] = []
    settings: list[str] = []
    slot, verbose = "", False
    rest = list(arguments)
    while rest:
        text = rest.pop(0)
        if text in ("-v", "--verbose"):
            verbose = True
        elif text.startswith("--slot"):
            slot = text.partition("=")[2] or (rest.pop(0) if rest else "")
        elif text.startswith("-"):
            raise UserError(f"plugins check has no flag {text}.\n{USAGE}")
        elif "=" in text and not (not names and text.partition("=")[0] in SLOTS):
            settings.append(text)
        else:
            names.append(text)
    if len(names) != 1:
        raise UserError(USAGE)
    return names, settings, slot, verbose


def _find(name: str, slot: str) -> tuple[str, str]:
    """(slot, name) of ``NAME`` or ``slot=NAME``; an only slot may be left out."""
    before, equals, after = name.partition("=")
    if equals:
        slot, name = before, after
    found = registry.get()
    if slot:
        return found.entry(slot, name).slot, name
    slots = [s for s in SLOTS if name in found.names(s)]
    if len(slots) == 1:
        return slots[0], name
    if slots:
        raise UserError(f"'{name}' is in several slots: type --slot {' or --slot '.join(slots)}.")
    known = {n for s in SLOTS for n in found.names(s)}
    raise UserError(unknown("component", name, known) + found.broken_text(name))


def _value(text: str) -> Any:
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[call-overload, index]


def _progress(line: str) -> None:
    print(f"\r\033[K{line[:70]}", end="", file=sys.stderr, flush=True)
