"""The runs under an output folder, and whether a process is still behind those called RUNNING.

A process that is killed outright (SIGKILL, out of memory, power) cannot close its run. What it
leaves is told from the run folder's lock, the process noted in the run, and its workers.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gsa_platform.errors import UserError
from gsa_platform.run_folder import LOCK_FILE, RUN_FILE, in_use, lock_folder, read_json
from gsa_platform.sweep import SWEEP_FILE
from gsa_platform.terminal import say
from gsa_platform.tracking.database import SQLITE, existing_store, mlflow_client
from gsa_platform.tracking.process import FOLDER_TAG, HOST_TAG, PID_TAG, is_alive, worker_pids
from gsa_platform.tracking.run import PARENT_TAG, find_runs, finish_run
from gsa_platform.worker import ERROR_FILE, RESULT_FILE

ALIVE, GONE, UNKNOWN = "alive", "gone", "unknown"


@dataclass
class FoundRun:
    """A run: its folder (which may be deleted), and what the store or the folder says of it."""

    folder: Path
    status: str
    started_s: float
    run_id: str | None = None
    uri: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    presence: str = ""  # of a RUNNING one: ALIVE, GONE or UNKNOWN
    reason: str = ""

    @property
    def loss(self) -> float | None:
        """Validation loss of a finished run."""
        value = _read(self.folder / RESULT_FILE).get("val_loss")
        return None if value is None else float(value)


def survey(root: Path) -> list[FoundRun]:
    """Every run whose folder lies under `root` or whose store is there, oldest first.

    Changes nothing and creates nothing.
    """
    found, folders = [], {}
    uris = {f"{SQLITE}{root.absolute()}/mlflow.db"}
    for pattern in (f"*/*/{RUN_FILE}", f"*/*/*/{RUN_FILE}", f"*/*/{SWEEP_FILE}"):
        for file in root.absolute().glob(pattern):
            record = _read(file)
            if record.get("run_id") and record.get("tracking_uri"):
                folders[str(record["run_id"])] = file.parent
                uris.add(str(record["tracking_uri"]))
            else:
                found.append(_from_folder(file.parent))
    for uri in sorted(uris):
        found += _from_store(uri, folders)
    found += [_from_folder(folder) for folder in folders.values()]
    parents = {run.tags.get(PARENT_TAG) for run in found if run.presence == ALIVE}
    for run in found:
        if run.run_id in parents and run.presence != ALIVE:
            run.presence, run.reason = ALIVE, "a job of it runs"
    return sorted(found, key=lambda run: (run.started_s, str(run.folder)))


def close_gone(run: FoundRun) -> str:
    """Close a RUNNING run without a process; returns its status, or "" if it was taken up again.

    The end of the run is the last time that anything was written into its folder. Its lock
    files go too.
    """
    assert run.run_id is not None and run.uri is not None
    status, ended = outcome(run.folder), _last_written(run.folder) or run.started_s
    with contextlib.ExitStack() as stack:
        if run.folder.is_dir():
            try:
                stack.enter_context(lock_folder(run.folder))
            except UserError:
                return ""
            # While it is held: a process that waits for it then sees that its file is gone.
            for name in (LOCK_FILE, f"{SWEEP_FILE}.lock"):
                stack.callback((run.folder / name).unlink, missing_ok=True)
        if mlflow_client(run.uri).get_run(run.run_id).info.status != "RUNNING":
            return ""
        finish_run(run.run_id, status, run.uri, ended)
    return status


def outcome(folder: Path) -> str:
    """How a training without a process ended, from what it wrote into its folder."""
    if (folder / RESULT_FILE).exists():
        return "FINISHED"
    return "FAILED" if _read(folder / ERROR_FILE).get("kind") in ("failure", "user") else "KILLED"


def _from_folder(folder: Path) -> FoundRun:
    """A run without a store, or whose store does not hold it."""
    alive = in_use(folder) or bool(worker_pids(folder))
    status = "RUNNING" if alive else outcome(folder)
    started = min(path.stat().st_mtime for path in folder.iterdir())
    return FoundRun(folder, status, started, presence=ALIVE if alive else "")


def _from_store(uri: str, folders: dict[str, Path]) -> list[FoundRun]:
    """The runs of a store; takes those it holds out of `folders`."""
    try:
        client = existing_store(uri)
        runs = [] if client is None else find_runs(client)
    except UserError:
        raise
    except Exception as error:  # a server that is down; whatever MLflow makes of it
        say(f"cannot read {uri}: {str(error).strip().partition(chr(10))[0]}")
        return []
    found = []
    for run in runs:
        tags = dict(run.data.tags)
        folder = folders.pop(run.info.run_id, None) or Path(tags.get(FOLDER_TAG, "(unknown)"))
        status, started = str(run.info.status), run.info.start_time / 1000
        row = FoundRun(folder, status, started, run.info.run_id, uri, tags)
        if status == "RUNNING":
            row.presence, row.reason = _presence(folder, tags)
        found.append(row)
    return found


def _presence(folder: Path, tags: dict[str, str]) -> tuple[str, str]:
    if in_use(folder):
        return ALIVE, ""
    if pids := worker_pids(folder):
        listed = " ".join(map(str, pids))
        return ALIVE, f"its workers run without their parent, which is gone; stop: kill {listed}"
    alive = is_alive(tags)
    if alive is None:
        host = tags.get(HOST_TAG)
        why = f"it was started on {host}" if host else "nothing says which process it had"
        return UNKNOWN, f"cannot be told here: {why}"
    return (ALIVE, "") if alive else (GONE, f"its process {tags[PID_TAG]} is gone")


def _last_written(folder: Path) -> float | None:
    files = (path for path in folder.rglob("*") if path.name != LOCK_FILE and path.is_file())
    return max((path.stat().st_mtime for path in files), default=None)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
