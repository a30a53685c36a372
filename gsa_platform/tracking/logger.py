"""Lightning loggers of a worker: MLflow, asynchronous, and a JSONL file that is always written.

Only global rank 0 writes; on other ranks the same objects do nothing and open nothing.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig

from gsa_platform.tracking.database import mlflow_client

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
    from mlflow.tracking import MlflowClient
    from mlflow.utils.async_logging.run_operations import RunOperations

log = logging.getLogger(__name__)

MAX_METRICS = 40
MAX_PENDING = 1000
METRICS_FILE = "metrics.jsonl"
# Storing a batch takes milliseconds of a core that training also wants: few, larger batches.
SEND_EVERY_S = 5.0
SEND_AT = 900  # metrics; MLflow takes at most 1000 in a batch


def build_loggers(cfg: DictConfig) -> list[Logger]:
    """Loggers for `Trainer(logger=...)`: MLflow first (unless tracking=none), then the JSONL file.

    Give every rank the list: the objects are inert off rank 0, and callbacks that insist on a
    logger work on all ranks.
    """
    loggers: list[Logger] = [JsonlLogger(cfg.run_dir, str(cfg.name))]
    if cfg.tracking.name == "mlflow" and cfg.tracking.get("run_id"):
        mlflow_logger = MlflowRunLogger(
            uri=cfg.tracking.uri,
            run_id=cfg.tracking.run_id,
            run_dir=cfg.run_dir,
            name=str(cfg.name),
            system_metrics=bool(cfg.tracking.get("system_metrics", False)),
        )
        loggers.insert(0, mlflow_logger)
    return loggers


class RunFolderLogger(Logger):
    """Common part: names, the run folder as save_dir, and parameters left to the parent."""

    def __init__(self, run_dir: str | Path, name: str, version: str) -> None:
        super().__init__()
        self._run_dir, self._name, self._version = Path(run_dir), name, version

    @property
    def name(self) -> str:
        """Name of the experiment."""
        return self._name

    @property
    def version(self) -> str:
        """MLflow run id, or the run folder's name."""
        return self._version

    @property
    def save_dir(self) -> str:
        """The run folder, so that `trainer.log_dir` is never None."""
        return str(self._run_dir)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the parent has logged the resolved config before the workers started."""


class JsonlLogger(RunFolderLogger):
    """Appends one JSON object per log call to `<run_dir>/metrics.jsonl`.

    Keys: `step`, `time` (seconds since the epoch) and the metrics; a non-finite value is the
    string "nan", "inf" or "-inf". A resumed run appends, so of two lines of a step the later
    one counts.
    """

    def __init__(self, run_dir: str | Path, name: str = "run") -> None:
        super().__init__(run_dir, name, Path(run_dir).name)
        self._file: TextIO | None = None

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one line."""
        if self._file is None:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            path = self._run_dir / METRICS_FILE
            self._file = open(path, "a", encoding="utf-8", buffering=1)
        values = {k: v if math.isfinite(v) else str(v) for k, v in _scalars(metrics).items()}
        if values:
            self._file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file; a later log call opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


class MlflowRunLogger(RunFolderLogger):
    """Sends metrics to an existing MLflow run in the background; never changes its status.

    Takes at most `max_metrics` names per run, because the MLflow pages become unusable with
    many; further names are refused with one warning and stay in metrics.jsonl.
    """

    def __init__(
        self,
        uri: str,
        run_id: str,
        run_dir: str | Path,
        name: str = "run",
        system_metrics: bool = False,
        max_metrics: int = MAX_METRICS,
    ) -> None:
        super().__init__(run_dir, name, run_id)
        self._uri, self._run_id, self._max = uri, run_id, max_metrics
        self._system_metrics = system_metrics
        self._client: MlflowClient | None = None
        self._monitor: SystemMetricsMonitor | None = None
        self._names: set[str] = set()
        self._pending: deque[RunOperations] = deque()
        self._warned = False
        self._queue: list[Metric] = []
        self._sent_at = time.monotonic()

    @property
    def experiment(self) -> MlflowClient | None:
        """The MLflow client; None off rank 0."""
        return self._connect() if getattr(rank_zero_only, "rank", 0) == 0 else None

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Queue metrics; they are sent every few seconds, and stored in the background."""
        self._connect()
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._queue += [
            Metric(name, value, now, step or 0)
            for key, value in _scalars(metrics).items()
            if self._accept(name := re.sub(r"[^A-Za-z0-9_/. -]+", "_", key))
        ]
        waited = time.monotonic() - self._sent_at
        if waited >= SEND_EVERY_S or len(self._queue) >= SEND_AT:
            self._send()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Wait until everything is stored, and stop the system metrics until the next log call.

        The status is ignored: Lightning ends every fit, validate and test with this call, and
        the parent knows better how the run ended.
        """
        self._send()  # before the monitor stops: sending would start it again
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
        self._wait(len(self._pending))

    def _send(self) -> None:
        self._sent_at = time.monotonic()
        while self._queue:
            batch, self._queue = self._queue[:SEND_AT], self._queue[SEND_AT:]
            client = self._connect()
            operation = client.log_batch(self._run_id, metrics=batch, synchronous=False)
            if operation is not None:
                self._pending.append(operation)
        if len(self._pending) > MAX_PENDING:
            self._wait(MAX_PENDING // 2)

    def _connect(self) -> MlflowClient:
        if self._client is None:
            self._client = mlflow_client(self._uri)
            logged = self._client.get_run(self._run_id).data.metrics
            self._names = {name for name in logged if not name.startswith("system/")}
        if self._system_metrics and self._monitor is None:
            self._monitor = self._start_monitor()
            self._system_metrics = self._monitor is not None
        return self._client

    def _start_monitor(self) -> SystemMetricsMonitor | None:
        node = os.environ.get("GROUP_RANK", os.environ.get("NODE_RANK", "0"))
        try:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            monitor = SystemMetricsMonitor(
                self._run_id,
                node_id=f"node_{node}",
                tracking_uri=self._uri,
                resume_logging=True,
            )
        except ImportError as error:
            log.warning("no system metrics: %s (install psutil, and pynvml for GPUs)", error)
            return None
        monitor.start()
        return monitor

    def _accept(self, name: str) -> bool:
        if name in self._names:
            return True
        if len(self._names) < self._max:
            self._names.add(name)
            return True
        if not self._warned:
            self._warned = True
            log.warning(
                "a run takes %d metric names; %r and further new names go to %s only",
                self._max,
                name,
                METRICS_FILE,
            )
        return False

    def _wait(self, count: int) -> None:
        from mlflow.exceptions import MlflowException

        for _ in range(count):
            try:
                self._pending.popleft().wait()
            except MlflowException as error:
                # Losing points of a curve must not end a training; metrics.jsonl has them.
                log.warning("MLflow refused metrics: %s", error)


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    # Lightning adds the epoch to each call; steps are the axis here.
    return {
        key: float(value)
        for key, value in metrics.items()
        if key != "epoch" and not isinstance(value, str)
    }
