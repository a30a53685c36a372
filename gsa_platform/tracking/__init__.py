"""Experiment tracking: the MLflow database, runs and loggers. Importing it loads no MLflow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gsa_platform.tracking.database import Database, open_database
from gsa_platform.tracking.run import create_run, discard_run, finish_run, resume_run

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

__all__ = [
    "Database",
    "build_loggers",
    "create_run",
    "discard_run",
    "finish_run",
    "open_database",
    "resume_run",
]


def build_loggers(cfg: Any) -> list[Logger]:
    """Lightning loggers of a worker's resolved config; see `tracking.logger.build_loggers`."""
    # The module imports Lightning, which the parent process must not.
    from gsa_platform.tracking.logger import build_loggers as build

    return build(cfg)
