"""``runs list`` and ``runs doctor``: what became of the runs, and closing those left open."""

from __future__ import annotations

import os
import time
from pathlib import Path

from gsa_platform.errors import UserError, unknown
from gsa_platform.runs import ALIVE, GONE, UNKNOWN, FoundRun, close_gone, survey

USAGE = (
    "Usage: gsa-platform runs list [output_root=FOLDER]\n"
    "         gsa-platform runs doctor [--fix] [RUN_FOLDER ...] [output_root=FOLDER]"
)
_SHOWN = {ALIVE: "RUNNING", GONE: "STALE", UNKNOWN: "RUNNING?"}


def run(arguments: list[str]) -> int:
    """Run ``runs list`` or ``runs doctor``; raises UserError for anything else."""
    command, *rest = arguments or ["list"]
    if command not in ("list", "doctor"):
        raise UserError(f"{unknown('runs command', command, ('list', 'doctor'))}\n  {USAGE}")
    root, named, fix = Path("runs"), [], False
    for word in rest:
        key, equals, value = word.partition("=")
        if equals and key == "output_root":
            root = Path(value).expanduser()
        elif word == "--fix" and command == "doctor":
            fix = True
        elif command == "list" or equals or word.startswith("-"):
            known = ("output_root=", *(("--fix",) if command == "doctor" else ()))
            raise UserError(f"{unknown('argument', word, known)}\n  {USAGE}")
        else:
            named.append(Path(word).expanduser().absolute())
    if not root.is_dir():
        raise UserError(f"There is no folder {root}. Type output_root=FOLDER, where the runs are.")
    found = survey(root)
    print(list_text(found) if command == "list" else doctor_text(found, named, fix))
    return 0


def list_text(found: list[FoundRun]) -> str:
    """A table of every run, oldest first."""
    if not found:
        return "no runs"
    rows = [("status", "started", "val loss", "run")]
    for item in found:
        status = _SHOWN.get(item.presence, item.status)
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(item.started_s))
        loss = "-" if item.loss is None else f"{item.loss:.4f}"
        rows.append((status, started, loss, _path(item.folder)))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, [*widths, 0])) for row in rows]
    stale = sum(item.presence in (GONE, UNKNOWN) for item in found)
    if stale:
        lines.append(f"{stale} left open; see: gsa-platform runs doctor")
    return "\n".join(lines)


def doctor_text(found: list[FoundRun], named: list[Path], fix: bool) -> str:
    """What is wrong with open runs, and, with `fix`, what was done about it.

    Runs in `named` are closed even if their process cannot be looked for from here; without
    `named`, every run whose process is gone.
    """
    open_runs = [item for item in found if item.presence]
    for path in named:
        if path not in [item.folder for item in open_runs]:
            choices = [str(item.folder) for item in open_runs]
            raise UserError(unknown("open run", str(path), choices))
    lines, left = [], 0
    for item in open_runs:
        chosen = item.folder in named if named else item.presence == GONE
        if item.presence == ALIVE:
            if item.reason or item.folder in named:
                lines.append(f"running  {_path(item.folder)}: {item.reason or 'leave it alone'}")
        elif chosen and fix:
            status = close_gone(item)
            done = f"closed as {status}" if status else "left alone: it was taken up again"
            lines.append(f"stale    {_path(item.folder)}: {done}")
        else:
            lines.append(f"{_word(item)}  {_path(item.folder)}: {item.reason}")
            left += 1
    if not lines:
        return "nothing to do: every run was closed or is running"
    if left and not fix:
        lines.append(
            "nothing was changed; 'gsa-platform runs doctor --fix' closes stale runs in MLflow "
            "and removes their locks"
        )
    if any(item.presence == UNKNOWN for item in open_runs) and not named:
        lines.append("a run that you know to be over: gsa-platform runs doctor --fix RUN_FOLDER")
    return "\n".join(lines)


def _word(item: FoundRun) -> str:
    return "stale  " if item.presence == GONE else "unknown"


def _path(folder: Path) -> str:
    """Relative where that is shorter, so that it can be copied from either place."""
    relative = os.path.relpath(folder)
    return str(folder) if relative.startswith("..") else relative
