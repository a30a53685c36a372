"""Data modules, evaluation tasks, callbacks and report sections through the hooks for them."""

from __future__ import annotations

import json
import math
import sys

import pytest

from gsa_platform import compose, registry
from gsa_platform.components import Plugin
from gsa_platform.errors import UserError
from gsa_platform.extensions import EXTENSIONS
from gsa_platform.registry import Registry
from gsa_platform.report.section import FinishedRun, sections
from gsa_plugins.callback.loss_spikes import LossSpikes
from gsa_plugins.extensions import LossSpikesConfig

EVERYTHING = """
from dataclasses import dataclass

import lightning as L
from gsa_platform import CallbackSettings, Extension, hookimpl
from gsa_platform.config import DataConfig
from gsa_platform.data.datamodule import TextDataModule
from gsa_platform.data.sources import Document, digest
from gsa_platform.eval.task import EvalTask


@dataclass
class AlphabetConfig(DataConfig):
    name: str = "alphabet"
    repeats: int = 400  # of the alphabet in each document


@dataclass
class CountConfig(CallbackSettings):
    word: str = "step"


@hookimpl
def gsa_register_data():
    return Extension("alphabet", "everything:Alphabet", AlphabetConfig, "Letters")


@hookimpl
def gsa_register_eval_task():
    return Extension("letters", "everything:Letters", summary="Counts letters")


@hookimpl
def gsa_register_callback():
    return Extension("count", "everything:Count", CountConfig)


@hookimpl
def gsa_register_report_section():
    return [
        Extension("letters_read", "everything:section"),
        Extension("fails", "everything:failing"),
    ]


class AlphabetSource:
    name = "alphabet"

    def __init__(self, repeats):
        self.repeats = repeats

    def fingerprint(self):
        return digest([self.name, self.repeats])

    def size(self):
        return None

    def __iter__(self):
        for n in range(8):
            yield Document(str(n), ["abcdefghijklmnopqrstuvwxyz" * self.repeats])


class Alphabet(TextDataModule):
    def source(self):
        return AlphabetSource(self.cfg.data.repeats)


class Letters(EvalTask):
    def evaluate(self, run):
        return {"letters": 26, "parameters": sum(p.numel() for p in run.module.parameters())}


class Count(L.Callback):
    def __init__(self, settings, cfg):
        self.word = settings.word

    def on_train_end(self, trainer, module):
        print(f"{self.word} {trainer.global_step}")


def section(run):
    return [("Tokens", run.summary["tokens"]), ("Documents", run.data.describe()["documents"])]


def failing(run):
    raise RuntimeError("no section today")
"""
SMALL = ["experiment=smoke", "context=128", "train.steps=2", "attention=dense", "tracking=none"]


def test_the_first_party_uses_every_hook():
    found = registry.get()
    assert {kind: found.names(kind) for kind in EXTENSIONS} == {
        "data": ["hf", "stdlib", "text"],
        "eval_task": ["perplexity"],
        "callback": ["loss_spikes"],
        "report_section": ["attention"],
        "benchmark": ["attention", "capture", "indexer"],
    }


def test_a_plugin_adds_one_of_each(cli, tmp_path):
    work = tmp_path / "work"
    (work / "everything.py").write_text(EVERYTHING)
    here = ["plugins_path=./everything.py", f"data.cache_dir={tmp_path / 'cache'}"]
    done = cli(
        *SMALL, "data=alphabet", "data.repeats=50", "callbacks.count.enabled=true",
        "callbacks.count.word=stopped", *here, OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "data    alphabet: 8 documents, 10,408 tokens" in done.stderr + done.stdout
    assert "stopped 2" in done.stdout + done.stderr
    box = done.stdout + done.stderr
    for words in ("Letters read", "Documents            8", "RuntimeError: no section today"):
        assert words in box
    (run,) = (work / "runs" / "smoke").iterdir()
    told = cli("eval", f"checkpoint={run}", "task=letters,perplexity",
               GSA_PLUGIN_PATH="./everything.py", OMP_NUM_THREADS="1")  # fmt: skip
    assert told.returncode == 0, told.stderr
    saved = json.loads((run / "checkpoints" / "eval.json").read_text())
    assert saved["letters"]["letters"] == 26 and saved["perplexity"] > 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data=stdlb"], "Did you mean 'stdlib'"),
        (["data.name=nothing"], "data=nothing is unknown"),
        (["data.repeats=3"], "Unknown setting of data 'repeats'"),
        (["callbacks.loss_spike.enabled=true"], "Did you mean 'loss_spikes'"),
        (["callbacks.loss_spikes.factor=big"], "callbacks.loss_spikes.factor"),
    ],
)
def test_wrong_names_and_settings_are_refused(cli, arguments, words):
    done = cli("check", "experiment=smoke", *arguments)
    assert done.returncode == 2 and words in done.stderr


def test_settings_that_a_callback_refuses_leave_no_run(cli, tmp_path):
    wrong = ["callbacks.loss_spikes.enabled=true", "callbacks.loss_spikes.window=1"]
    done = cli(*SMALL, *wrong)
    assert done.returncode == 2 and "callbacks.loss_spikes: window" in done.stderr
    assert not (tmp_path / "work" / "runs").exists()


def test_the_default_of_a_callback_is_off():
    cfg = compose.load(["picked.hardware=none"])
    assert cfg.callbacks.loss_spikes.enabled is False


@pytest.mark.parametrize(
    ("kind", "returned", "message"),
    [
        ("data", "Extension('x', 'm:C')", "subclass of DataConfig"),
        ("callback", "Extension('x', 'm:C')", "subclass of CallbackSettings"),
        ("benchmark", "Extension('x', 'm:C')", "subclass of BenchmarkSettings"),
        ("eval_task", "Extension('x', 'no colon')", "package.module:name"),
        ("eval_task", "Extension('X y', 'm:C')", "lower-case"),
        ("report_section", "'x'", "must return Extension records"),
    ],
)
def test_malformed_records_are_refused(tmp_path, monkeypatch, kind, returned, message):
    monkeypatch.delitem(sys.modules, "wrong_record", raising=False)
    (tmp_path / "wrong_record.py").write_text(
        "from gsa_platform import Extension, hookimpl\n"
        f"@hookimpl\ndef gsa_register_{kind}():\n    return {returned}\n"
    )
    found = Registry({})
    found.load_path(tmp_path / "wrong_record.py")
    assert found.plugins[0].status == "broken" and message in found.plugins[0].reason


def test_two_of_one_name_are_a_conflict():
    found = Registry({})
    found.load_entry_points()
    entry = found.entry("eval_task", "perplexity")
    found._add(type(entry)("eval_task", entry.component, Plugin("other", "other-dist", "1")))
    with pytest.raises(UserError, match="eval_task=perplexity is offered twice"):
        found.require_no_conflicts()


class FakeTrainer:
    is_global_zero, should_stop = True, False

    def __init__(self) -> None:
        self.global_step, self.callback_metrics = 0, {}


class FakeModule:
    def log(self, name, value):
        self.logged = {name: value}


def steps(losses, **settings):
    callback = LossSpikes(LossSpikesConfig(enabled=True, window=4, **settings), None)
    trainer, module = FakeTrainer(), FakeModule()
    for loss in losses:
        trainer.global_step += 1
        trainer.callback_metrics = {"train/loss": loss, "train/grad_norm": 1.0}
        callback.on_train_batch_end(trainer, module)
        callback.on_train_batch_end(trainer, module)  # another micro-batch of the same step
    return callback, trainer, module


def test_spikes_are_counted_once_and_left_out_of_the_median(capsys):
    callback, trainer, module = steps([2.0, 1.9, 1.9, 9.0, 8.0, 1.8, 2.7])
    assert [step for step, _, _ in callback.spikes] == [4, 5]
    assert module.logged == {"train/spikes": 2.0} and not trainer.should_stop
    assert "step 4: train/loss 9" in "".join(capsys.readouterr())


def test_it_stops_at_a_loss_that_is_not_finite():
    assert not steps([1.0, math.nan])[1].should_stop
    assert steps([1.0, math.nan], stop=True)[1].should_stop


def test_a_failing_section_does_not_end_the_run(monkeypatch):
    found = registry.get()

    def broken(_run):
        raise KeyError("keys")

    monkeypatch.setattr(type(found), "target", lambda *_: broken)
    told = sections(FinishedRun({}, None, None, None, None), found)
    assert told == [("Attention", [("failed", "KeyError: 'keys'")])]
