"""A sweep: its folder, the MLflow run over its jobs, and the place of one job in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from omegaconf import DictConfig

from gsa_platform.atomic import write_json
from gsa_platform.run_folder import new_folder, read_json, remove_empty
from gsa_platform.tracking.run import create_sweep_run, finish_run

SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class SweepContext:
    """Place of one job in a sweep: the sweep's folder, the job's number and its overrides."""

    folder: Path
    job: int
    overrides: tuple[str, ...] = ()


def new_sweep_folder(cfg: DictConfig) -> Path:
    """A new folder <output_root>/<name>/sweep-<time>-<id> for the jobs of one sweep."""
    return new_folder(Path(cfg.output_root).absolute() / str(cfg.name), "sweep-")


def sweep_run(cfg: DictConfig, folder: Path) -> str | None:
    """Id of the MLflow run over a sweep's jobs, created by whichever job comes first."""
    if cfg.tracking.name != "mlflow":
        return None
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder / f"{SWEEP_FILE}.lock")):
        if (folder / SWEEP_FILE).exists():
            return str(read_json(folder / SWEEP_FILE)["run_id"])
        run_id = create_sweep_run(cfg, folder)
        write_json(folder / SWEEP_FILE, {"run_id": run_id, "tracking_uri": cfg.tracking.uri})
        return run_id


def finish_sweep(folder: Path, status: str) -> None:
    """Close the run over a sweep's jobs with FINISHED, FAILED or KILLED, if there is one.

    Without any job there is none, and the empty folder goes, with those above that it left empty.
    """
    if (folder / SWEEP_FILE).exists():
        record = read_json(folder / SWEEP_FILE)
        finish_run(record["run_id"], status, record["tracking_uri"])
    remove_empty(folder)
