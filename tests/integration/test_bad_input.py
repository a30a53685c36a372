"""Bad input, as it is typed: one message, exit code 2, and nothing written."""

from __future__ import annotations

import errno
import re
import sys
from pathlib import Path

import pytest
import torch

from gsa_platform import cli
from gsa_platform.launch import launch
from gsa_platform.tracking import open_database

pytestmark = pytest.mark.usefixtures("fresh_registry")

BROKEN = """
from gsa_platform import Component, hookimpl

import package_that_is_not_there
"""
REFUSER = """
from dataclasses import dataclass
from gsa_platform import Component, hookimpl

@dataclass
class Config:
    name: str = "refuser"
    scale: float = 1.0

@hookimpl
def gsa_register_gate():
    return Component("refuser", "refuser:Gate", Config)

class Gate:
    def __init__(self, config, dims):
        raise ValueError("gate.scale=1.0 is refused here")
"""
SETTINGS = ("experiment=smoke", "context=512", "tracking.system_metrics=false")

# What is typed after SETTINGS, and what the message must say.
BAD = [
    # unknown names
    (("experiment=smoek",), "Did you mean 'smoke'"),
    (("attention=gsaa",), "Did you mean 'gsa'"),
    (("sparsity=fxed",), "Did you mean 'fixed'(.|\n)*adaptive_variance"),
    (("trian.steps=3",), "Did you mean 'train'"),
    (("train.stepz=3",), "Did you mean 'steps'"),
    (("sparsity.kk=3",), "Unknown setting of sparsity=fixed 'kk'. Did you mean 'k'"),
    (("attention.name=dense",), "Type attention=dense"),
    (("tracking.tags.team=red",), r"Type \+tracking.tags.team=red"),
    (("plugins_path=broken.py", "attention=broken"), "offers it but .*package_that_is_not_there"),
    (("plugins_path=absent.py",), "absent.py' is not a Python file"),
    (("--config-dir", "absent", "seed=1"), "there is no folder .*absent"),
    # values of the wrong kind
    (("sparsity.k=x",), r"sparsity.k=x: needs a whole number \(default 256\)"),
    (("sparsity.k=null",), r"sparsity.k=null: needs a whole number \(default 256\)"),
    (("sparsity.k=[1,2]",), r"sparsity.k=\[1,2\]: needs a whole number"),
    (("seed=1e5",), r"seed=1e5: needs a whole number \(default 0\). Type seed=100000"),
    (("optim.lr=fast",), r"optim.lr=fast: needs a number \(default 0.0003\)"),
    (("model.qk_norm=maybe",), r"model.qk_norm=maybe: needs true or false \(default true\)"),
    (("data.tokenizer=[a]",), r"needs text \(default bytes\)"),
    (("train.resume=[a]",), r"needs text, or null \(default null\)"),
    (("optim.schedule=[a]",), "needs one of cosine, wsd, constant"),
    (("optim.betas=0.9",), r"needs a list of numbers, such as .* \(default \[0.9,0.95\]\)"),
    (("optim.betas=[a,b]",), "needs a list of numbers"),
    (("model.layer_pattern=dense",), r"needs a list of texts, such as \[a,b\] \(default \[\]\)"),
    (("model.rope_scaling=x",), "model.rope_scaling.PART=VALUE: kind, factor"),
    (("tracking.tags=x",), r"needs named parts, each typed \+tracking.tags.NAME=VALUE"),
    (("+tracking.tags.a=[1]",), "tracking.tags.a=.*needs text"),
    (("+hardware.cpu=x",), "hardware.cpu=x: needs a list of texts"),
    (("plugins_path=refuser.py", "gate=refuser", "gate.scale=x"), "gate.scale=x: needs a number"),
    (("sparsity.k=1,2",), "several values need a sweep. Add -m"),
    (("-m", "sparsity.k=256,x"), "sparsity.k=x: needs a whole number"),
    (("~train.steps",), "a setting cannot be left out"),
    (("seed=${oops}",), "seed: .*'oops'"),
    # settings that do not go together
    (("attention=dense", "indexer=gated_lightning"), "attention=dense takes no selection"),
    (("sparsity.k=64",), r"below what is always attended(.|\n)*sparsity\.k=80"),
    (("model.n_heads=3", "model.n_kv_heads=2"), "does not divide model.n_heads=3"),
    (
        ("model.n_heads=4", "model.n_kv_heads=2", "indexer.heads=3",
         "attention.selection_heads=kv"),
        "indexer.heads=3 is not a multiple of 2",
    ),
    (("attention.mode=nonsense",), "token, block or tile"),
    (("plugins_path=refuser.py", "gate=refuser"), "gate=refuser: gate.scale=1.0 is refused here"),
    (("attention.impl=triton",), "impl=triton cannot run"),
    # data
    (("data=text",), "data=text needs files"),
    (("data=text", "data.paths=[nothing.txt]"), "'nothing.txt' matches no file"),
    (("data=text", "data.paths=[empty.txt]"), "all empty"),
    (("data=hf",), "data=hf needs a data set. Type data.path=FOLDER"),
    (("data=hf", "data.path=./absent"), "no such file or folder. Give a|gsa-platform.hf"),
    (("data.max_bytes=20000", "context=65536"), "context 65536 is longer than the data"),
    (("data.tokenizer=absent.json",), "absent.json: no such file"),
    # checkpoints
    (("train.resume=absent.ckpt",), "no such checkpoint"),
    (("train.resume=broken.py",), "broken.py is not a checkpoint"),
    (("train.resume=folder",), "is a folder, but not that of a run"),
    (("train.resume=other.ckpt",), "holds another model"),
    # tracking
    (("tracking.uri=mlruns",), "MLflow needs a database or a server"),
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def work(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with plugins, a checkpoint and texts, to type commands in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GSA_CACHE", str(cache))
    monkeypatch.setenv("GSA_PLUGIN_PATH", "")  # restored after plugins_path= sets it
    monkeypatch.setenv("GSA_PLUGINS_REPORTED", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # a user has not set it
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for module in ("broken", "refuser"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    (tmp_path / "broken.py").write_text(BROKEN)
    (tmp_path / "refuser.py").write_text(REFUSER)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    torch.save({"state_dict": {"model.norm.weight": torch.zeros(3)}}, tmp_path / "other.ckpt")
    return tmp_path


def refused(work: Path, capfd: pytest.CaptureFixture[str], *typed: str) -> str:
    """The message of a command that must be refused and leave nothing."""
    before = sorted(work.rglob("*"))
    code = cli.main(typed)
    out, err = capfd.readouterr()
    assert code == 2, out + err
    assert "Traceback" not in out + err and err.count("error: ") == 1, err
    assert sorted(work.rglob("*")) == before
    return err


@pytest.mark.parametrize(("typed", "message"), BAD, ids=[" ".join(typed) for typed, _ in BAD])
def test_bad_input_is_one_message_and_leaves_nothing(
    work: Path, capfd: pytest.CaptureFixture[str], typed: tuple[str, ...], message: str
) -> None:
    assert re.search(message, refused(work, capfd, *SETTINGS, *typed))


@pytest.mark.parametrize("place", ["experiment", "sparsity"])
def test_a_file_with_a_value_of_the_wrong_kind_is_named(
    work: Path, capfd: pytest.CaptureFixture[str], place: str
) -> None:
    folder = work / "conf" / place
    folder.mkdir(parents=True)
    text = {
        "experiment": "# @package _global_\nsparsity:\n  k: many\n",
        "sparsity": "defaults:\n  - fixed\n  - _self_\nk: many\n",
    }
    (folder / "mine.yaml").write_text(text[place])
    message = refused(work, capfd, "--config-dir", "conf", f"{place}=mine")
    assert f"'{place}/mine' sets sparsity.k=many: needs a whole number (default 2048)" in message
    (folder / "mine.yaml").write_text("k: {\n")
    assert "mine.yaml" in refused(work, capfd, "--config-dir", "conf", f"{place}=mine")


@pytest.mark.parametrize("mode", [(), ("trainer.devices=2",), ("-m", "seed=1")], ids=" ".join)
def test_errors_of_workers_leave_no_database_either(
    work: Path, capfd: pytest.CaptureFixture[str], mode: tuple[str, ...]
) -> None:
    before = sorted(work.rglob("*"))
    code = cli.main([*SETTINGS, *mode, "train.resume=other.ckpt", "trainer.accelerator=cpu"])
    assert code == (1 if "-m" in mode else 2)  # a sweep goes on after a failed job
    assert "holds another model" in capfd.readouterr().err
    assert sorted(work.rglob("*")) == before


def test_disk_full_while_caching(
    work: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gsa_platform.data import store

    def full(handle: object, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "_write", full)
    monkeypatch.setenv("GSA_CACHE", str(work.parent / "full"))
    assert "no space left for the token cache" in refused(work, capfd, *SETTINGS)


def test_a_failure_that_is_not_the_users_is_kept_in_a_run(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gsa_platform import compose
    from gsa_platform.data.datamodule import TextDataModule

    def crash(self: TextDataModule) -> None:
        raise RuntimeError("the disk went away")

    monkeypatch.setattr(TextDataModule, "prepare_data", crash)
    with pytest.raises(RuntimeError, match="went away"):
        launch(compose.load(list(SETTINGS)))
    client = open_database(f"sqlite:///{work}/runs/mlflow.db").client()
    (run,) = client.search_runs([client.get_experiment_by_name("smoke").experiment_id])
    assert run.info.status == "FAILED"
    (folder,) = (work / "runs" / "smoke").iterdir()
    assert "went away" in (folder / "error.json").read_text()
