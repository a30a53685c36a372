"""Training from the command line, in processes of their own: what it leaves, resume, several
devices, sweeps and other components."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from gsa_platform import compose
from gsa_platform.checkpoint import LastCheckpoint
from gsa_platform.eval.command import evaluate
from gsa_platform.launch import launch
from gsa_platform.tracking import open_database
from gsa_platform.validate import validate

pytestmark = pytest.mark.slow

SMALL = ("experiment=smoke", "context=512", "tracking.system_metrics=false")
Gsa = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def gsa(cache: Path) -> Gsa:
    """Run ``python -m gsa_platform`` in the given folder."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("GSA_")}
    environ |= {"GSA_CACHE": str(cache), "OMP_NUM_THREADS": "1"}

    def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gsa_platform", *arguments]
        return subprocess.run(
            command, cwd=folder, env=environ, capture_output=True, text=True, timeout=150
        )

    return run


def train(gsa: Gsa, folder: Path, *overrides: str) -> str:
    done = gsa(folder, *SMALL, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_folders(folder: Path, name: str = "smoke") -> list[Path]:
    return sorted(path.parent for path in (folder / "runs" / name).rglob("run.json"))


def mlflow_runs(folder: Path, name: str = "smoke") -> list[Any]:
    client = open_database(f"sqlite:///{folder}/runs/mlflow.db").client()
    return list(client.search_runs([client.get_experiment_by_name(name).experiment_id]))


def logged(run: Path, name: str) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def losses(run: Path) -> list[float]:
    return logged(run, "train/loss")


@pytest.fixture(scope="module")
def smoke(gsa: Gsa, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and stdout of a finished run of three steps."""
    folder = tmp_path_factory.mktemp("smoke")
    return folder, train(gsa, folder)


def test_smoke_leaves_a_finished_run(smoke: tuple[Path, str]) -> None:
    folder, output = smoke
    (run,) = run_folders(folder)
    assert "| Learning" in output
    command = f"mlflow ui --backend-store-uri sqlite:///{folder}/runs/mlflow.db"
    assert command in output.splitlines()  # whole, on a line of its own
    files = ("config.yaml", "result.json", "metrics.jsonl", "checkpoints/last.ckpt")
    assert all((run / name).stat().st_size > 0 for name in files)
    assert [path.name for path in folder.iterdir()] == ["runs"]
    names = {path.name for path in (folder / "runs").iterdir()}
    assert names - {"mlflow.db-wal", "mlflow.db-shm"} <= {
        "smoke", "mlflow.db", "mlflow.db.lock", "mlflow-artifacts",
    }  # fmt: skip
    assert len(losses(run)) == 3
    (logged,) = mlflow_runs(folder)
    assert logged.info.status == "FINISHED"
    assert logged.info.run_id == json.loads((run / "run.json").read_text())["run_id"]
    assert 0 < len(logged.data.metrics) <= 40, sorted(logged.data.metrics)
    params = logged.data.params
    assert params["context"] == "512" and params["attention.name"] == "gsa"


def test_checkpoint_is_plain(smoke: tuple[Path, str]) -> None:
    (run,) = run_folders(smoke[0])
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    config = saved["gsa_platform"]["config"]
    assert saved["global_step"] == 3 and saved["gsa_platform"]["vocab_size"] > 255
    assert type(config) is dict and config["context"] == 512
    assert config["model"]["d_model"] == OmegaConf.load(run / "config.yaml").model.d_model


def test_resume_ends_where_a_straight_run_does(gsa: Gsa, tmp_path: Path) -> None:
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    straight.mkdir()
    halves.mkdir()
    train(gsa, straight, "optim.schedule=constant", "train.steps=4")
    train(gsa, halves, "optim.schedule=constant", "train.steps=2")
    (first,) = mlflow_runs(halves)
    done = gsa(halves, *SMALL, "optim.schedule=constant", "train.steps=4", "train.resume=auto")
    assert done.returncode == 0 and "last.ckpt, at step 2 of 4\n" in done.stdout
    assert "Be aware" not in done.stderr
    (again,) = mlflow_runs(halves)
    assert again.info.run_id == first.info.run_id and again.info.status == "FINISHED"
    (one,), (two,) = run_folders(straight), run_folders(halves)
    assert len(losses(two)) == 4 and losses(two) == pytest.approx(losses(one), rel=1e-5)


def test_a_checkpoint_keeps_nothing_of_its_callback(smoke: tuple[Path, str]) -> None:
    (run,) = run_folders(smoke[0])
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert not [key for key in saved["callbacks"] if LastCheckpoint.__name__ in key]


def test_two_devices_accumulate_and_resume_as_one_straight_run(gsa: Gsa, tmp_path: Path) -> None:
    common = ("trainer.accelerator=cpu", "optim.schedule=constant", "train.accumulate=2")
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    train(gsa, one, *common, "train.batch_size=2", "train.steps=4")
    train(gsa, two, *common, "trainer.devices=2", "train.steps=2")
    train(gsa, two, *common, "trainer.devices=2", "train.steps=4", "train.resume=auto")
    (alone,), (together,) = run_folders(one), run_folders(two)
    assert [r.info.status for r in mlflow_runs(two)] == ["FINISHED"]
    for name in ("train/loss", "train/index_loss", "train/grad_norm", "gate/value_mean"):
        expected = logged(alone, name)
        assert len(expected) == 4
        assert logged(together, name) == pytest.approx(expected, rel=1e-3), name
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)
    for name in ("attention/keys_mean", "attention/keys_max"):
        assert logged(together, name) == logged(alone, name)
    weights = [
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in (alone, together)
    ]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_sweep(gsa: Gsa, tmp_path: Path) -> None:
    output = train(gsa, tmp_path, "-m", "train.steps=1,2")
    assert "2 of 2 jobs finished" in output
    folders = run_folders(tmp_path)
    assert [path.name for path in folders] == ["000", "001"]
    assert [len(losses(path)) for path in folders] == [1, 2]
    runs = mlflow_runs(tmp_path)
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = [r for r in runs if r is not parent]
    assert {r.data.tags["mlflow.parentRunId"] for r in children} == {parent.info.run_id}
    assert len(children) == 2 and {r.info.status for r in runs} == {"FINISHED"}
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


VARIANTS = [
    ("attention=dense", "gate=none"),
    ("attention=dense", "gate=dual"),
    ("indexer=relu_lightning",),
    ("objective=bias",),
    ("sparsity=adaptive_variance", "sparsity.k=256", "context=1024"),
    ("model.layer_pattern=[dense:1,'*']",),
    ("data.cross_document=false",),
    ("train.activation_checkpointing=true",),
    ("trainer.precision=bf16-mixed",),
    ("train.val_every=1",),
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=" ".join)
def test_variants_train(
    overrides: tuple[str, ...],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In this process, because most of a short run is imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GSA_CACHE", str(cache))
    cfg = compose.load([*SMALL, "train.steps=2", "tracking=none", *overrides])
    validate(cfg)
    result = launch(cfg)
    assert result["status"] == "FINISHED"
    assert len(losses(run_folders(tmp_path)[0])) == 2
    if overrides == ("attention=dense", "gate=none"):
        slots = "attention=dense indexer=none sparsity=none gate=none objective=none"
        assert slots in capfd.readouterr().out


@pytest.mark.parametrize(("steps", "validated"), [(5, [0, 2, 4, 5]), (4, [0, 2, 4])])
def test_validation_during_training(
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    validated: list[int],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GSA_CACHE", str(cache))
    accumulated = (f"train.steps={steps}", "train.val_every=2", "train.accumulate=2")
    cfg = compose.load([*SMALL, "tracking=none", *accumulated])
    validate(cfg)
    launch(cfg)
    (run,) = run_folders(tmp_path)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val/loss" in line] == validated


def test_a_local_hugging_face_data_set_trains(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GSA_CACHE", str(cache))
    rows = [{"body": f"document {i}: " + "some words " * 60} for i in range(30)]
    (tmp_path / "corpus").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "corpus" / "train.jsonl").write_text(lines)
    data = ("data=hf", "data.path=corpus", "data.column=body")
    cfg = compose.load([*SMALL, "train.steps=2", "tracking=none", *data])
    validate(cfg)
    assert launch(cfg)["status"] == "FINISHED"
    assert "hf: 30 documents" in capfd.readouterr().out


def test_eval_on_other_text_and_context(
    smoke: tuple[Path, str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GSA_CACHE", str(cache))
    (run,) = run_folders(smoke[0])
    (tmp_path / "a.txt").write_text("some words " * 500)
    settings = ["context=256", "sparsity.k=128", "train.val_batches=3"]
    result = evaluate(
        [f"checkpoint={run}", "data=text", f"data.paths=[{tmp_path}/*.txt]", *settings]
    )
    assert result["context"] == 256 and result["tokens"] == 256
    assert [row["from"] for row in result["by_position"]] == [0, 2, 4, 8, 16, 32, 64, 128]


# overrides, parameters, least factor that dense training costs more
CHECKS = [
    ((), 163_088, 30.0),
    (("model=paper_1b7",), 1_205_706_944, 5.0),
]


@pytest.mark.parametrize(("overrides", "parameters", "factor"), CHECKS)
def test_check_gives_plausible_figures(
    gsa: Gsa, tmp_path: Path, overrides: tuple[str, ...], parameters: int, factor: float
) -> None:
    done = gsa(tmp_path, "check", "experiment=gsa_128k", "hardware={}", "model=nano", *overrides)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert "context 131,072" in text and f"parameters   {parameters:,} " in text
    figures = re.search(r"if dense .*: ([\d.]+) x", text)
    memory = re.search(r"memory +([\d,.]+) GB", text)
    assert figures and float(figures[1]) > factor
    assert memory and float(memory[1]) > 16 * parameters / 1e9
    assert list(tmp_path.iterdir()) == []
