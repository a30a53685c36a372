"""The command as a user types it: train, evaluate, two ranks, and mistakes that cost nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SMALL = [
    "experiment=smoke",
    "context=512",
    "tracking.system_metrics=false",
    "optim.schedule=constant",
    "objective=none",
]


def command(folder: Path, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "GSA_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)  # a user has not set it
    return subprocess.run(
        [sys.executable, "-m", "gsa_platform", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def losses(folder: Path, name: str = "smoke") -> list[float]:
    (run,) = (folder / "runs" / name).iterdir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_smoke_trains_summarises_and_evaluates(tmp_path: Path, cache: Path) -> None:
    done = command(tmp_path, cache, "experiment=smoke", "tracking.system_metrics=false")
    assert done.returncode == 0, done.stderr
    assert "Selection recall" in done.stdout and "mlflow ui --backend-store-uri" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
    (run,) = (tmp_path / "runs" / "smoke").iterdir()
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["gsa_platform"]["config"]["context"] == 1024
    assert json.loads((run / "result.json").read_text())["loss"] > 0
    judged = command(tmp_path, cache, "eval", f"checkpoint={run}")
    assert judged.returncode == 0, judged.stderr
    assert json.loads((run / "checkpoints" / "eval.json").read_text())["perplexity"] > 1


def test_two_ranks_follow_one_rank_with_the_same_global_batch(tmp_path: Path, cache: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    cpu = ["trainer.accelerator=cpu", "train.steps=3"]
    first = command(one, cache, *SMALL, *cpu, "train.batch_size=2")
    assert first.returncode == 0, first.stderr
    second = command(two, cache, *SMALL, *cpu, "train.batch_size=1", "trainer.devices=2")
    assert second.returncode == 0, second.stdout + second.stderr
    assert len(losses(one)) == 3
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)


@pytest.mark.parametrize(
    "arguments",
    [
        ["experiment=smok"],
        ["experiment=smoke", "indexer=gated_lightnin"],
        ["experiment=smoke", "sparsity.k=x"],
        ["experiment=smoke", "sparsity.k=64"],
        ["experiment=smoke", "model.n_kv_heads=2", "model.n_heads=3"],
        ["experiment=smoke", "attention=dense", "indexer=gated_lightning"],
        ["experiment=smoke", "attention.mode=nonsense"],
        ["experiment=smoke", "attention.impl=triton"],
        ["experiment=smoke", "data=text", "data.paths=[nothing.txt]"],
        ["experiment=smoke", "data.max_bytes=20000", "context=65536"],
    ],
    ids=lambda arguments: "-".join(arguments[-1:]),
)
def test_a_mistake_is_one_message_and_leaves_nothing(
    tmp_path: Path, cache: Path, arguments: list[str]
) -> None:
    done = command(tmp_path, cache, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "error:" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("runs/*/*/checkpoints"))
    assert not list(tmp_path.glob("runs/*/*/result.json"))
