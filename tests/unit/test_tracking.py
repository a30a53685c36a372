"""The MLflow database under races, runs, and the loggers."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from gsa_platform.atomic import write_json, write_text, write_text_once
from gsa_platform.errors import UserError
from gsa_platform.tracking import (
    Database,
    build_loggers,
    create_run,
    discard_run,
    finish_run,
    open_database,
    resume_run,
)
from gsa_platform.tracking.logger import JsonlLogger, MlflowRunLogger
from gsa_platform.tracking.run import flatten_params


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Database:
    return open_database(f"sqlite:///{tmp_path_factory.mktemp('db')}/mlflow.db")


def config(database: Database, run_dir: Path, **extra: Any) -> DictConfig:
    tracking = {
        "name": "mlflow",
        "uri": database.uri,
        "experiment": None,
        "run_name": None,
        "system_metrics": False,
        "run_id": None,
        "parent_run_id": None,
        "tags": {"study": "unit"},
    }
    return OmegaConf.create(
        {
            "name": "unit",
            "run_dir": str(run_dir),
            "optim": {"lr": 3e-4, "betas": [0.9, 0.95]},
            "tracking": tracking,
            **extra,
        }
    )


def test_four_processes_open_a_fresh_database_at_once(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    code = (
        "import pathlib, sys, time; from gsa_platform.tracking import open_database\n"
        "import mlflow.tracking\n"
        "folder = pathlib.Path(sys.argv[2]); (folder / sys.argv[3]).touch()\n"
        "while len(list(folder.iterdir())) < 4: time.sleep(0.01)\n"
        "open_database(sys.argv[1]).client().create_run('0')\n"
        "assert 'torch' not in sys.modules\n"
    )
    ready = tmp_path / "ready"  # all have imported MLflow before the first opens the file
    ready.mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, uri, str(ready), str(i)], stderr=subprocess.PIPE
        )
        for i in range(4)
    ]
    errors = [process.communicate(timeout=180)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0, 0], errors
    with sqlite3.connect(tmp_path / "new" / "mlflow.db") as connection:
        assert connection.execute("select count(*) from runs").fetchone() == (4,)


def test_relative_sqlite_path_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Database
) -> None:
    from gsa_platform.tracking.database import normalise_uri

    monkeypatch.chdir(tmp_path)
    assert normalise_uri("sqlite:///a/b.db") == f"sqlite:///{tmp_path}/a/b.db"
    assert normalise_uri("http://server:5000") == "http://server:5000"
    assert database.artifact_location("a b") == (
        f"file://{Path(database.uri.removeprefix('sqlite:///')).parent}/mlflow-artifacts/a_b"
    )


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "sqlite:///:memory:"])
def test_unusable_store_names_the_choices(uri: str) -> None:
    with pytest.raises(UserError, match="tracking=none"):
        open_database(uri)


def test_missing_sqlalchemy_names_tracking_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    with pytest.raises(UserError, match="tracking=none"):
        open_database(f"sqlite:///{tmp_path}/runs/mlflow.db")
    assert list(tmp_path.iterdir()) == []


def test_a_database_that_could_not_be_made_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mlflow.db"

    def fill(uri: str) -> None:
        path.write_text("half a schema")
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("gsa_platform.tracking.database._checked_client", fill)
    with pytest.raises(UserError, match="no space left"):
        open_database(f"sqlite:///{path}")
    assert not path.exists()


def test_tracking_import_loads_neither_mlflow_nor_torch() -> None:
    code = (
        "import sys, gsa_platform.tracking, gsa_platform.launch, gsa_platform.worker\n"
        "print([m for m in ('mlflow', 'torch', 'hydra', 'lightning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_create_run_logs_params_tags_and_artifacts(database: Database, tmp_path: Path) -> None:
    many = {f"key{i}": i for i in range(230)}
    cfg = config(database, tmp_path, many=many, long="x" * 9000, notes=["said once"])
    run_id = create_run(cfg, tmp_path / "stamp")
    client = database.client()
    run = client.get_run(run_id)
    assert run.info.status == "RUNNING" and run.info.run_name == "stamp"
    assert run.data.params["optim.lr"] == "0.0003"
    assert run.data.params["optim.betas"] == "[0.9, 0.95]"
    assert run.data.params["many.key229"] == "229"
    assert len(run.data.params["long"]) == 6000
    assert not {"run_dir", "notes", "tracking.run_id"} & set(run.data.params)
    assert run.data.tags["group"] == "unit" and run.data.tags["study"] == "unit"
    names = {file.path for file in client.list_artifacts(run_id)}
    assert {"config.yaml", "command.txt", "environment.json"} <= names
    environment = json.loads(
        Path(client.download_artifacts(run_id, "environment.json")).read_text()
    )
    assert environment["packages"]["torch"]
    assert run.info.artifact_uri.startswith(database.artifact_location("unit"))
    finish_run(run_id, "FINISHED", database.uri)
    assert client.get_run(run_id).info.status == "FINISHED"


def test_params_are_stable_and_distinguish_cut_values() -> None:
    first = flatten_params({"a": None, "b": True, "c": {}, "d": {"e": [1, "x"]}, "f": 1e-5})
    assert first == {"a": "null", "b": "true", "c": "{}", "d.e": '[1, "x"]', "f": "1e-05"}
    cut = [flatten_params({"long": "y" * 7000 + end})["long"] for end in "ab"]
    assert cut[0] != cut[1]


def test_resume_logs_new_params_and_tags_changed_ones(database: Database, tmp_path: Path) -> None:
    cfg = config(database, tmp_path)
    run_id = create_run(cfg, tmp_path)
    finish_run(run_id, "KILLED", database.uri)
    cfg.optim.lr, cfg.optim.clip = 1e-3, 1.0
    resume_run(run_id, cfg)
    run = database.client().get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params["optim.lr"] == "0.0003" and run.data.params["optim.clip"] == "1.0"
    assert json.loads(run.data.tags["param_drift"]) == {"optim.lr": ["0.0003", "0.001"]}
    with pytest.raises(KeyError, match="no run"):
        resume_run("0" * 32, cfg)


def test_discard_spares_runs_with_metrics(database: Database, tmp_path: Path) -> None:
    client = database.client()
    empty, used = (create_run(config(database, tmp_path), tmp_path) for _ in range(2))
    client.log_metric(used, "loss", 1.0)
    artifacts = Path(client.get_run(empty).info.artifact_uri.removeprefix("file://"))
    assert artifacts.is_dir()
    assert discard_run(empty, database.uri) and not discard_run(used, database.uri)
    assert not artifacts.exists()
    experiment = client.get_run(used).info.experiment_id
    alive = {run.info.run_id for run in client.search_runs([experiment])}
    assert used in alive and empty not in alive


def test_logged_points_are_stored_after_finalize(database: Database, tmp_path: Path) -> None:
    run_id = create_run(config(database, tmp_path), tmp_path)
    logger = MlflowRunLogger(database.uri, run_id, tmp_path)
    for step in range(100):
        logger.log_metrics({"loss": 1.0 / (step + 1), "epoch": 0}, step)
    logger.finalize("success")
    client = database.client()
    history = client.get_metric_history(run_id, "loss")
    assert [point.step for point in history] == list(range(100))
    assert set(client.get_run(run_id).data.metrics) == {"loss"}
    assert client.get_run(run_id).info.status == "RUNNING"  # the parent closes it


def test_metrics_travel_in_few_large_batches(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = create_run(config(database, tmp_path), tmp_path)
    logger = MlflowRunLogger(database.uri, run_id, tmp_path)
    client = logger.experiment
    assert client is not None
    sizes: list[int] = []
    send = client.log_batch

    def counted(run: str, metrics: list[object], **kwargs: object) -> object:
        sizes.append(len(metrics))
        return send(run, metrics=metrics, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(client, "log_batch", counted)
    monkeypatch.setattr("gsa_platform.tracking.logger.SEND_EVERY_S", 3600.0)
    for step in range(1250):
        logger.log_metrics({"loss": 1.0, "lr": 2.0}, step)
    logger.finalize("success")
    assert sizes == [900, 900, 700]
    assert len(database.client().get_metric_history(run_id, "lr")) == 1250


def test_names_beyond_forty_are_refused_with_one_warning(
    database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = create_run(config(database, tmp_path), tmp_path)
    with caplog.at_level(logging.WARNING, logger="gsa_platform"):
        logger = MlflowRunLogger(database.uri, run_id, tmp_path)
        for step in range(2):
            logger.log_metrics({f"m{i}": float(i) for i in range(50)}, step)
        logger.finalize("success")
    assert len(database.client().get_run(run_id).data.metrics) == 40
    assert len([r for r in caplog.records if "metric names" in r.message]) == 1
    # The names of a resumed run count too.
    again = MlflowRunLogger(database.uri, run_id, tmp_path)
    again.log_metrics({"new": 1.0, "m3": 7.0}, 5)
    again.finalize("success")
    metrics = database.client().get_run(run_id).data.metrics
    assert "new" not in metrics and metrics["m3"] == 7.0


def test_jsonl_has_one_line_per_call(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path)
    logger.log_metrics({"loss": 2.5, "epoch": 0}, 1)
    logger.finalize("success")
    logger.log_metrics({"loss": float("nan")}, 2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 2.5), (2, "nan")]
    assert set(lines[0]) == {"step", "time", "loss"}


def test_loggers_by_tracking_choice_and_rank(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(database, tmp_path)
    cfg.tracking.run_id = "0" * 32
    assert [type(x) for x in build_loggers(cfg)] == [MlflowRunLogger, JsonlLogger]
    cfg.tracking.name = "none"
    assert [type(x) for x in build_loggers(cfg)] == [JsonlLogger]
    cfg.tracking.name = "mlflow"
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    for logger in build_loggers(cfg):  # the run does not exist: a write would raise
        logger.log_metrics({"loss": 1.0}, 1)
        logger.finalize("success")
        assert logger.save_dir == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_system_metrics_carry_the_node(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("psutil")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    monkeypatch.setenv("GROUP_RANK", "3")
    run_id = create_run(config(database, tmp_path), tmp_path)
    logger = MlflowRunLogger(database.uri, run_id, tmp_path, system_metrics=True)
    logger.log_metrics({"loss": 1.0}, 1)
    time.sleep(1.5)
    logger.finalize("success")
    metrics = database.client().get_run(run_id).data.metrics
    assert "system/node_3/cpu_utilization_percentage" in metrics


def test_atomic_writes(tmp_path: Path) -> None:
    path = write_json(tmp_path / "sub" / "a.json", {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    write_text(path, "new")
    assert path.read_text() == "new"
    assert not write_text_once(path, "later") and path.read_text() == "new"
    assert write_text_once(tmp_path / "sub" / "b", "first")
    assert sorted(os.listdir(tmp_path / "sub")) == ["a.json", "b"]
