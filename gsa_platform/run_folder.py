"""The folder of a run: making it, locking it, what is written into it, and its checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig

from gsa_platform.atomic import write_json, write_text, write_yaml
from gsa_platform.errors import UserError
from gsa_platform.terminal import say
from gsa_platform.worker import ERROR_FILE, RESULT_FILE

CONFIG_FILE, RUN_FILE, LOCK_FILE = "config.yaml", "run.json", ".lock"
LAST_CHECKPOINT = "last*.ckpt"
SHARDED_MARK = ".metadata"  # in the folder of a sharded checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to go on from, and the run folder and run.json it belongs to, if any."""

    path: Path
    run_dir: Path | None
    record: dict[str, Any]


def find_checkpoint(cfg: DictConfig, in_sweep: bool = False) -> Checkpoint | None:
    """The checkpoint that `train.resume` names, or None to start anew.

    A path is a checkpoint or a run folder. "auto" is the newest last checkpoint of the runs of
    this name that no other process is using; if there is none, the training starts anew.
    Jobs of a sweep may start from a path, each in a run of its own; "auto" is nothing to them.
    """
    asked = cfg.train.get("resume")
    if asked in (None, "", False) or (in_sweep and asked == "auto"):
        return None
    if asked != "auto":
        path = Path(str(asked)).expanduser().absolute()
        found = path
        if not path.exists():
            raise UserError(
                f"train.resume={asked}: no such file; give a checkpoint, a run folder or auto"
            )
        if path.is_dir() and not (path / SHARDED_MARK).exists():
            if not (path / RUN_FILE).exists():
                raise UserError(f"train.resume={asked} is a folder, but not that of a run")
            last = _last_checkpoint(path)
            if last is None:
                raise UserError(f"train.resume={asked}: the run has no {LAST_CHECKPOINT}")
            found = last
        if in_sweep:
            return Checkpoint(found, None, {})
        owner = next((p for p in [path, *path.parents] if (p / RUN_FILE).is_file()), None)
        return Checkpoint(found, owner, read_json(owner / RUN_FILE) if owner else {})
    candidates = []
    for record in (Path(cfg.output_root) / str(cfg.name)).glob(f"*/{RUN_FILE}"):
        last = _last_checkpoint(record.parent)
        if last is not None and not in_use(record.parent):
            candidates.append((last.stat().st_mtime, last, record))
    if not candidates:
        say(f"train.resume=auto: no checkpoint of {cfg.name} to go on from, starting anew")
        return None
    _, path, record = max(candidates)
    return Checkpoint(path, record.parent, read_json(record))


def new_folder(parent: Path, prefix: str = "") -> Path:
    """Make and return a folder of its own, named by the time."""
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = parent / f"{prefix}{stamp}-{secrets.token_hex(3)}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


def job_folder(sweep: Path, job: int) -> Path:
    """Make and return a folder for a job of a sweep; a job tried again gets another one."""
    sweep.mkdir(parents=True, exist_ok=True)
    attempt = 0
    while True:
        folder = sweep / (f"{job:03d}" if attempt == 0 else f"{job:03d}-{attempt}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
        attempt += 1


def lock_folder(folder: Path) -> FileLock:
    """Take the lock of a run folder; raises UserError if another process has it."""
    lock = FileLock(str(folder / LOCK_FILE))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder} is in use by another process; wait or stop it") from None
    return lock


def remove_empty(folder: Path) -> None:
    """Remove a folder, and the two above it, as far as they are empty."""
    with contextlib.suppress(OSError):  # rmdir refuses folders that hold anything
        for empty in (folder, folder.parent, folder.parent.parent):
            empty.rmdir()


def set_aside_previous(folder: Path) -> None:
    """Clear the outcome of an earlier attempt and keep its config as config.<n>.yaml."""
    for name in (RESULT_FILE, ERROR_FILE):
        (folder / name).unlink(missing_ok=True)
    if (folder / CONFIG_FILE).exists():
        number = len(list(folder.glob("config.*.yaml"))) + 1
        os.replace(folder / CONFIG_FILE, folder / f"config.{number}.yaml")


def write_run_files(folder: Path, cfg: DictConfig, run_id: str | None, job: str = "") -> None:
    """Write the command, run.json and the resolved config; `job` describes a sweep's job."""
    command = folder / "command.txt"
    lines = command.read_text(encoding="utf-8") if command.exists() else ""
    if job:
        lines += f"# {job}\n"
    write_text(command, f"{lines}{shlex.join(sys.argv)}\n")
    record = {
        "run_id": run_id,
        "tracking_uri": cfg.tracking.uri if run_id else None,
        "name": str(cfg.name),
        "parent_run_id": cfg.tracking.get("parent_run_id"),
    }
    write_json(folder / RUN_FILE, record)
    write_yaml(folder / CONFIG_FILE, cfg)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    value = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(value, dict), path
    return value


def _last_checkpoint(folder: Path) -> Path | None:
    found = [(path.stat().st_mtime, path) for path in folder.rglob(LAST_CHECKPOINT)]
    return max(found)[1] if found else None


def in_use(folder: Path) -> bool:
    """Whether a process holds the lock of a run folder."""
    if not (folder / LOCK_FILE).exists():
        return False  # asking must not create it
    try:
        with FileLock(str(folder / LOCK_FILE), timeout=0):
            return False
    except Timeout:
        return True
