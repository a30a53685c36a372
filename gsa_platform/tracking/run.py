"""MLflow runs as the parent process sees them: create, resume, close, discard, sweep parents."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from omegaconf import DictConfig, OmegaConf

from gsa_platform.tracking.database import Database, mlflow_client, open_database
from gsa_platform.tracking.environment import git_state, versions
from gsa_platform.tracking.process import process_tags

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

STATUSES = ("FINISHED", "FAILED", "KILLED")
PARENT_TAG, SOURCE_TAG, SOURCE = "mlflow.parentRunId", "mlflow.source.name", "gsa_platform"
MAX_KEY, MAX_VALUE, MAX_TAG, BATCH = 250, 6000, 5000, 100
# Differ between any two runs or are changed by a resume: no parameters of the experiment.
VOLATILE = (
    "run_dir",
    "output_root",
    "train.resume",
    "tracking.run_id",
    "tracking.parent_run_id",
    "tracking.uri",
    "notes",
)


def create_run(cfg: DictConfig, run_dir: str | Path, database: Database | None = None) -> str:
    """Create the MLflow run of a resolved config, log params and provenance, return its id.

    The run is RUNNING afterwards. Uses `cfg.tracking`: uri, experiment, run_name, tags,
    parent_run_id. If logging fails, the run is closed as FAILED before the error goes on.
    """
    database = database or open_database(cfg.tracking.uri)
    client = database.client()
    run_name = cfg.tracking.get("run_name") or Path(run_dir).name
    parent = cfg.tracking.get("parent_run_id")
    run_id = _new_run(client, database, cfg, run_name, parent, Path(run_dir))
    try:
        _log_params(client, run_id, flatten_params(cfg))
        _log_provenance(client, run_id, cfg, folder="")
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    return run_id


def resume_run(run_id: str, cfg: DictConfig) -> str:
    """Set a run RUNNING again; log new params, put changed ones into the tag `param_drift`.

    Returns the status the run had.

    MLflow params cannot change, so `param_drift` is JSON of key -> [logged value, value now].
    The new config and environment become artifacts under `resumes/<n>/`.
    Raises KeyError if the store does not hold the run.
    """
    client = mlflow_client(cfg.tracking.uri)
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise KeyError(f"no run {run_id} in {cfg.tracking.uri}") from error
    if run.info.lifecycle_stage == "deleted":
        raise KeyError(f"run {run_id} in {cfg.tracking.uri} was deleted")
    for key, value in process_tags(cfg.run_dir).items():
        client.set_tag(run_id, key, value)
    client.update_run(run_id, status="RUNNING")
    try:
        logged, now = run.data.params, flatten_params(cfg)
        _log_params(client, run_id, {k: v for k, v in now.items() if k not in logged})
        drift = {k: [logged[k], v] for k, v in now.items() if logged.get(k, v) != v}
        if drift:
            client.set_tag(run_id, "param_drift", json.dumps(drift)[:MAX_TAG])
        count = int(run.data.tags.get("resumes", "0")) + 1
        client.set_tag(run_id, "resumes", str(count))
        _log_provenance(client, run_id, cfg, folder=f"resumes/{count}/")
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    return str(run.info.status)


def finish_run(run_id: str, status: str, uri: str, end_s: float | None = None) -> None:
    """Close a run with FINISHED, FAILED or KILLED; end_s: Unix time of its end, None for now."""
    assert status in STATUSES, status
    end_ms = None if end_s is None else int(1000 * end_s)
    mlflow_client(uri).set_terminated(run_id, status, end_ms)


def find_runs(client: MlflowClient) -> list[Run]:
    """Every run of this platform in a store, deleted ones left out."""
    experiments = [e.experiment_id for e in client.search_experiments()]
    found: list[Run] = []
    token = None
    while experiments:
        page = client.search_runs(
            experiments, f"tags.`{SOURCE_TAG}` = '{SOURCE}'", page_token=token
        )
        found += page
        token = page.token
        if not token:
            break
    return found


def discard_run(run_id: str, uri: str) -> bool:
    """Delete a run that logged no metric, with its artifacts; False, and kept, if it has any."""
    client = mlflow_client(uri)
    run = client.get_run(run_id)
    if any(not name.startswith("system/") for name in run.data.metrics):
        return False
    client.set_terminated(run_id, "FAILED")
    client.delete_run(run_id)
    location = urlparse(run.info.artifact_uri or "")
    if location.scheme == "file":
        artifacts = Path(unquote(location.path)).parent
        # MLflow's layout is <experiment>/<run id>/artifacts; never remove anything else.
        if artifacts.name == run_id:
            shutil.rmtree(artifacts, ignore_errors=True)
    return True


def create_sweep_run(cfg: DictConfig, folder: Path) -> str:
    """Create the run that the jobs of a sweep hang under, and return its id."""
    database = open_database(cfg.tracking.uri)
    client = database.client()
    run_id = _new_run(client, database, cfg, folder.name, None, folder)
    client.set_tag(run_id, "sweep", "true")
    client.log_text(run_id, shlex.join(sys.argv) + "\n", "command.txt")
    return run_id


def flatten_params(cfg: Any) -> dict[str, str]:
    """A config as MLflow params: dotted keys, and values that read the same on every run.

    Lists are JSON; too long keys and values are cut and end in a digest of the whole.
    """
    plain = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg
    params: dict[str, str] = {}
    for key, value in _leaves(plain, ""):
        if not any(key == v or key.startswith(f"{v}.") for v in VOLATILE):
            text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
            clean = re.sub(r"[^A-Za-z0-9_\-. /:]", "_", key)
            params[_shorten(clean, MAX_KEY)] = _shorten(text, MAX_VALUE)
    return params


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and (node or not prefix):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def _shorten(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"{text[: limit - 14]}..{digest}"


def _new_run(
    client: MlflowClient,
    database: Database,
    cfg: DictConfig,
    run_name: str,
    parent: str | None,
    folder: Path,
) -> str:
    experiment = str(cfg.tracking.get("experiment") or cfg.name)
    own = OmegaConf.to_container(cfg.tracking.get("tags") or OmegaConf.create({}), resolve=True)
    assert isinstance(own, dict)
    tags = {"group": str(cfg.name), **{str(k): str(v) for k, v in own.items()}}
    tags |= {SOURCE_TAG: SOURCE, "mlflow.source.type": "LOCAL", **process_tags(folder)}
    if parent:
        tags[PARENT_TAG] = str(parent)
    experiment_id = _experiment_id(client, database, experiment)
    return str(client.create_run(experiment_id, tags=tags, run_name=str(run_name)).info.run_id)


def _experiment_id(client: MlflowClient, database: Database, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, database.artifact_location(name)))
        except MlflowException:
            # Another process may have created it since; anything else is a real error.
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _log_params(client: MlflowClient, run_id: str, params: dict[str, str]) -> None:
    from mlflow.entities import Param

    entities = [Param(key, value) for key, value in params.items()]
    for start in range(0, len(entities), BATCH):
        client.log_batch(run_id, params=entities[start : start + BATCH])


def _log_provenance(client: MlflowClient, run_id: str, cfg: DictConfig, folder: str) -> None:
    config = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    config.tracking.run_id = run_id
    made_with, git = versions(), git_state()
    client.log_text(run_id, OmegaConf.to_yaml(config), f"{folder}config.yaml")
    client.log_text(run_id, shlex.join(sys.argv) + "\n", f"{folder}command.txt")
    client.log_text(run_id, json.dumps(made_with, indent=2) + "\n", f"{folder}environment.json")
    tags = {"version": str(made_with["gsa_platform"]), "python": str(made_with["python"])}
    tags["plugins"] = json.dumps(made_with["plugins"])[:MAX_TAG]
    if git is not None:
        tags["git.dirty"] = json.dumps(git.dirty)
        tags |= {"mlflow.source.git.commit": git.commit} if git.commit else {}
        tags |= {"mlflow.source.git.branch": git.branch} if git.branch else {}
        if git.diff:
            client.log_text(run_id, git.diff, f"{folder}git.diff")
    for key, value in tags.items():
        client.set_tag(run_id, key, value)
