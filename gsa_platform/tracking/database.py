"""Opens the MLflow store; a SQLite file is created once, under a lock, before anything uses it."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from gsa_platform.errors import UserError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

SQLITE = "sqlite:///"
LOCK_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Database:
    """An MLflow store that exists and has its schema.

    `uri` holds an absolute path if it is SQLite; `artifact_root` is the folder for artifacts
    beside a SQLite file, None where a server decides.
    """

    uri: str
    artifact_root: Path | None

    def client(self) -> MlflowClient:
        """A client of this store; raises UserError if MLflow is not installed."""
        return mlflow_client(self.uri)

    def artifact_location(self, experiment: str) -> str | None:
        """Artifact URI for a new experiment."""
        if self.artifact_root is None:
            return None
        folder = re.sub(r"[^A-Za-z0-9_.-]+", "_", experiment) or "experiment"
        return (self.artifact_root / folder).as_uri()


def normalise_uri(uri: str) -> str:
    """The URI with an absolute path if it is SQLite (`sqlite:///runs/a.db` is relative).

    Raises UserError for a folder store, which MLflow no longer accepts.
    """
    if uri.startswith(SQLITE):
        path, question, query = uri[len(SQLITE) :].partition("?")
        if not path or path == ":memory:":
            raise UserError(
                f"tracking.uri={uri}: workers in other processes need a file; use "
                "sqlite:///path/to/mlflow.db or choose tracking=none"
            )
        return f"{SQLITE}{Path(path).expanduser().absolute()}{question}{query}"
    if "://" not in uri or uri.startswith("file:"):
        raise UserError(
            f"tracking.uri={uri}: MLflow needs a database or a server; use "
            "sqlite:///path/to/mlflow.db, http(s)://server, or choose tracking=none"
        )
    return uri


def open_database(uri: str) -> Database:
    """Create the store's schema where it is missing and return the store.

    Safe to call from many processes at once on a file that does not exist yet. Raises UserError
    for an unusable URI, a missing MLflow, or a schema of another MLflow version.
    """
    uri = normalise_uri(uri)
    if not uri.startswith(SQLITE):
        return Database(uri, None)
    _client_class(uri)  # refuses before anything is created
    path = _sqlite_path(uri)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"tracking.uri={uri}: cannot create {path.parent}: {error}") from error
    # MLflow creates tables and runs migrations in the client's constructor with no lock of its
    # own, so two first users of one file break each other.
    with FileLock(f"{path}.lock", timeout=LOCK_TIMEOUT_S):
        fresh = not path.exists()
        try:
            _checked_client(uri)
        except BaseException as error:
            if fresh:
                path.unlink(missing_ok=True)  # half a schema would break every later run
            if "disk is full" in str(error):
                raise UserError(f"tracking.uri={uri}: no space left for the database") from error
            raise
    return Database(uri, path.parent / "mlflow-artifacts")


def existing_store(uri: str) -> MlflowClient | None:
    """A client of a store that is there already; None, and nothing created, if it is not.

    Raises UserError for a schema of another MLflow version.
    """
    return _checked_client(uri) if store_exists(uri) else None


def store_exists(uri: str) -> bool:
    """Whether a store is there already; a server always is."""
    return not uri.startswith(SQLITE) or _sqlite_path(uri).is_file()


def mlflow_client(uri: str) -> MlflowClient:
    """An MlflowClient for `uri`; raises UserError, naming `tracking=none`, without MLflow."""
    return _client_class(uri)(uri)


def _client_class(uri: str) -> type[MlflowClient]:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        if not uri.startswith(("http://", "https://")):
            import sqlalchemy  # noqa: F401  (mlflow-skinny lacks it and would fail much later)
        from mlflow.tracking import MlflowClient
    except ImportError as error:
        raise UserError(
            f"tracking=mlflow needs the full mlflow package ({error}); install `mlflow` "
            "(mlflow-skinny has no database) or choose tracking=none"
        ) from error
    return MlflowClient


def _sqlite_path(uri: str) -> Path:
    return Path(uri[len(SQLITE) :].partition("?")[0])


def _checked_client(uri: str) -> MlflowClient:
    """Creates the schema of an empty database, which MLflow does in the client's constructor."""
    for name in ("mlflow.store.db.utils", "alembic.runtime.migration"):
        logging.getLogger(name).setLevel(logging.WARNING)
    client = mlflow_client(uri)
    from mlflow.exceptions import MlflowException

    try:
        client.get_experiment_by_name("Default")
    except MlflowException as error:
        if "out-of-date" not in str(error):
            raise
        raise UserError(
            f"tracking.uri={uri} was written by another MLflow version; back it up and run "
            f"`mlflow db upgrade {uri}`, or choose another tracking.uri"
        ) from error
    return client
