"""The process behind a run: noted in the run's tags when it starts, and looked for later."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

FOLDER_TAG = "run_dir"
HOST_TAG, PID_TAG, STARTED_TAG = "process.host", "process.pid", "process.started"
# The start of a process is counted from the boot time, which moves when the clock is set.
_CLOCK_S = 5.0


def process_tags(folder: str | Path) -> dict[str, str]:
    """Tags that name the folder of a run and the process that calls this."""
    import psutil

    return {
        FOLDER_TAG: str(Path(folder).absolute()),
        HOST_TAG: socket.gethostname(),
        PID_TAG: str(os.getpid()),
        STARTED_TAG: f"{psutil.Process().create_time():.2f}",
    }


def is_alive(tags: Mapping[str, str]) -> bool | None:
    """Whether the process in the tags runs; None if that cannot be known on this machine."""
    import psutil

    if tags.get(HOST_TAG) != socket.gethostname():
        return None
    try:
        process = psutil.Process(int(tags[PID_TAG]))
        # The number may have gone to another process since; a zombie only awaits its parent.
        same = abs(process.create_time() - float(tags[STARTED_TAG])) < _CLOCK_S
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def worker_pids(folder: Path) -> list[int]:
    """Workers that train the config of a run folder on this machine; they outlive a parent that
    was killed."""
    import psutil

    config = str(folder / "config.yaml")
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if config in words and "gsa_platform.worker" in words:
            found.append(process.pid)
    return found
