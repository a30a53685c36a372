"""The parent of a training: run folder, MLflow run, workers, and the truth about how it ended.

Imports no torch unless it trains inline, which it does for one device outside a sweep.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from omegaconf import DictConfig, OmegaConf

from gsa_platform.atomic import write_json
from gsa_platform.errors import UserError
from gsa_platform.processes import (
    signals_ignored,
    terminate_on_sigterm,
    train_in_workers,
    try_in_process,
)
from gsa_platform.run_folder import (
    Checkpoint,
    find_checkpoint,
    job_folder,
    lock_folder,
    new_folder,
    remove_empty,
    set_aside_previous,
    write_run_files,
)
from gsa_platform.sweep import SweepContext, sweep_run
from gsa_platform.terminal import say
from gsa_platform.tracking.database import (
    SQLITE,
    Database,
    normalise_uri,
    open_database,
    store_exists,
)
from gsa_platform.tracking.run import create_run, discard_run, finish_run, resume_run
from gsa_platform.worker import (
    ERROR_FILE,
    LOG_FILE,
    RESULT_FILE,
    TARGET,
    Terminated,
    execute,
    save_error,
)

log = logging.getLogger(__name__)


def launch(
    cfg: DictConfig,
    sweep: SweepContext | None = None,
    *,
    target: str = TARGET,
    inline: bool | None = None,
) -> dict[str, Any]:
    """Train one validated config and return the result: what the training function returned
    plus status, run_dir, run_id (None without MLflow) and tracking_uri.

    `inline` None trains in this process if there is one device and no sweep. Every run is closed:
    FINISHED, KILLED (Ctrl-C, SIGTERM) or FAILED. Raises UserError (nothing is then left of a new
    run that logged nothing), KeyboardInterrupt, Terminated (SystemExit 143), WorkerError, or,
    inline, whatever the training raised.
    """
    cfg = _own_copy(cfg)
    devices = resolve_devices(cfg)
    cfg.trainer.devices = devices
    if inline is None:
        inline = devices == 1 and sweep is None and int(cfg.trainer.get("num_nodes", 1)) == 1
    resumed = find_checkpoint(cfg, in_sweep=sweep is not None)
    cfg.train.resume = str(resumed.path) if resumed is not None else None
    with terminate_on_sigterm():
        prepared = _refuse_early(cfg, inline) if target == TARGET else ()
        run = _open_run(cfg, sweep, resumed)
        try:
            say(f"run     {run.folder}")
            if inline:
                result = execute(cfg, target, *prepared)
                write_json(run.folder / RESULT_FILE, result)
            else:
                result = train_in_workers(cfg, target, plain=devices == 1)
        except BaseException as error:
            with signals_ignored():
                run.close_after(error)
            raise
        with signals_ignored():
            run.close("FINISHED")
    return {
        **result,
        "status": "FINISHED",
        "run_dir": str(run.folder),
        "run_id": run.run_id,
        "tracking_uri": cfg.tracking.uri if run.run_id else None,
    }


def resolve_devices(cfg: DictConfig) -> int:
    """Number of worker processes per node; "auto" and -1 are all GPUs, or one CPU process.

    Raises UserError for what is no number, and for GPUs that are not there.
    """
    asked, kind = cfg.trainer.devices, str(cfg.trainer.get("accelerator", "auto"))
    everything = asked in ("auto", -1, "-1")
    if kind == "cpu" and everything:
        return 1
    from gsa_platform.hardware import detect

    found = detect()
    gpus = found.count if found.kind == "cuda" else 0
    # On a Mac "gpu" is Metal, which detect() does not know.
    if not gpus and (kind == "cuda" or (kind == "gpu" and sys.platform != "darwin")):
        raise UserError(
            f"trainer.accelerator={kind}: there is no GPU here."
            " Type trainer.accelerator=auto or trainer.accelerator=cpu."
        )
    if everything:
        return max(1, gpus)
    try:
        count = int(asked)
    except (TypeError, ValueError):
        count = 0
    if count < 1:
        raise UserError(f"trainer.devices={asked}: choose a positive number, -1 or auto")
    if gpus and kind != "cpu" and count > gpus:
        raise UserError(f"trainer.devices={asked}: this machine has {gpus}, so 1 to {gpus}")
    return count


def _refuse_early(cfg: DictConfig, inline: bool) -> tuple[Any, ...]:
    """Raise the UserErrors of a training before its run exists; returns what was prepared.

    Workers raise them in a run that is then discarded. A store that was made for that run would
    stay, so that the first run of a store is tried in a process of its own.
    """
    if inline:
        from gsa_platform.preflight import preflight

        return (preflight(cfg),)
    if cfg.tracking.name == "mlflow" and not store_exists(cfg.tracking.uri):
        try_in_process(cfg)
    return ()


@dataclass
class _Run:
    cfg: DictConfig
    folder: Path
    run_id: str | None
    resumed: bool
    lock: FileLock
    earlier_status: str = "FAILED"  # of a resumed run, before this attempt

    def close_after(self, error: BaseException) -> None:
        """Close the run the way `error` ended it; remove it if it never got to train."""
        try:
            save_error(self.folder, error)
        except OSError as failure:  # a full disk must not leave the run open
            log.warning("could not write %s: %s", self.folder / ERROR_FILE, failure)
        if isinstance(error, UserError) and not self.resumed and self._untrained():
            self._discard()
        elif isinstance(error, UserError) and self.resumed:
            # Refused before the first step: the run is what it was.
            self.close(self.earlier_status)
        elif isinstance(error, KeyboardInterrupt | Terminated):
            self.close("KILLED")
        else:
            self.close("FAILED")

    def close(self, status: str) -> None:
        self.lock.release()
        if self.run_id is None:
            return
        try:
            finish_run(self.run_id, status, self.cfg.tracking.uri)
        except Exception as error:
            # The training's own outcome matters more than a store that went away.
            log.warning("could not set run %s to %s: %s", self.run_id, status, error)

    def _untrained(self) -> bool:
        metrics = self.folder / "metrics.jsonl"
        logged = metrics.exists() and metrics.stat().st_size > 0
        return not logged and not any(self.folder.rglob("*.ckpt"))

    def _discard(self) -> None:
        if self.run_id is not None and not discard_run(self.run_id, self.cfg.tracking.uri):
            self.close("FAILED")
            return
        self.lock.release()
        for path in self.folder.iterdir():
            if path.name == LOG_FILE and path.stat().st_size > 0:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        remove_empty(self.folder)


def _open_run(cfg: DictConfig, sweep: SweepContext | None, resumed: Checkpoint | None) -> _Run:
    # First whatever can fail for reasons of the user's, then the folder, then the run.
    database = open_database(cfg.tracking.uri) if cfg.tracking.name == "mlflow" else None
    if sweep is not None:
        cfg.tracking.parent_run_id = sweep_run(cfg, Path(sweep.folder))
        folder = job_folder(Path(sweep.folder).absolute(), sweep.job)
    elif resumed is not None and resumed.run_dir is not None:
        folder = resumed.run_dir
    else:
        folder = new_folder(Path(cfg.output_root) / str(cfg.name))
    lock = lock_folder(folder)
    cfg.run_dir = str(folder)
    continued = resumed is not None and resumed.run_dir is not None
    run = _Run(cfg, folder, None, continued, lock)
    try:
        if continued:
            set_aside_previous(folder)
        if database is not None:
            old = resumed.record.get("run_id") if resumed is not None else None
            run.run_id, status = _open_mlflow_run(cfg, folder, database, old)
            if status in ("FINISHED", "KILLED"):
                run.earlier_status = status
        cfg.tracking.run_id = run.run_id
        job = ""
        if sweep is not None and sweep.overrides:
            job = f"sweep job {sweep.job}: {shlex.join(sweep.overrides)}"
        write_run_files(folder, cfg, run.run_id, job)
    except BaseException as error:
        with signals_ignored():
            run.close_after(error)
        raise
    return run


def _open_mlflow_run(
    cfg: DictConfig, folder: Path, database: Database, old: str | None
) -> tuple[str, str]:
    """(run id, the status it had): the old run if there is one to go on with, else a new one."""
    if old:
        try:
            return old, resume_run(old, cfg)
        except KeyError as error:
            say(f"going on in a new MLflow run: {error.args[0]}")
    return create_run(cfg, folder, database), "RUNNING"


def _own_copy(cfg: DictConfig) -> DictConfig:
    # Plain and resolved, so that inline training sees exactly what a worker reads from YAML.
    copy = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    assert isinstance(copy, DictConfig)
    copy.output_root = str(Path(str(copy.output_root)).expanduser().absolute())
    if copy.tracking.name == "mlflow":
        default = f"{SQLITE}{copy.output_root}/mlflow.db"
        copy.tracking.uri = normalise_uri(str(copy.tracking.get("uri") or default))
    return copy
