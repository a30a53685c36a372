"""Each refusal names the value and the override to type."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gsa_platform import compose, hardware
from gsa_platform.errors import UserError
from gsa_platform.validate import validate

pytestmark = pytest.mark.usefixtures("fresh_registry")


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setattr(
        hardware, "detect", lambda: hardware.Hardware("cpu", "CPU", 1, 16.0, 4, 16.0)
    )


def problems(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        validate(compose.load(["experiment=smoke", *overrides]))
    return str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=gsa_128k"],
        ["experiment=smoke"],
        ["experiment=smoke", "attention=dense"],
        ["attention.mode=token"],
        ["attention.mode=block"],
        ["sparsity=adaptive_variance"],
        ["model.layer_pattern=['dense:1','*']"],
        ["model.layer_pattern=[dense]"],
        ["optim.schedule=wsd", "train.resume=auto", "trainer.devices=-1"],
    ],
)
def test_good_configurations_pass(overrides):
    validate(compose.load(overrides))


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        ("model.n_kv_heads=3", ["n_kv_heads=3", "n_heads=2", "Type model.n_kv_heads=1 or 2"]),
        ("model.head_dim=31", ["model.head_dim=31", "even", "model.head_dim=32"]),
        ("context=0", ["context=0", "Type context=1"]),
        ("train.steps=0", ["train.steps=0", "at least 1"]),
        ("train.val_every=-1", ["train.val_every=-1", "at least 0"]),
        ("optim.lr=0", ["optim.lr", "positive"]),
        ("data.val_fraction=2", ["data.val_fraction=2", "between 0 and 1"]),
        ("trainer.precision=bf16", ["trainer.precision=bf16", "Did you mean", "bf16-mixed"]),
        ("trainer.accelerator=tpu", ["trainer.accelerator=tpu", "cpu"]),
        ("trainer.devices=0", ["trainer.devices=0", "Type trainer.devices=1"]),
        ("trainer.devices=some", ["trainer.devices=some"]),
        ("optim.schedule=cosin", ["optim.schedule=cosin", "Did you mean 'cosine'"]),
        ("optim.warmup_steps=3", ["optim.warmup_steps=3", "train.steps=3", "warmup_steps=0.1"]),
        ("optim.warmup_steps=1.5", ["optim.warmup_steps=1.5", "whole", "warmup_steps=1"]),
        ("optim.betas=[0.9]", ["optim.betas"]),
        ("attention.mode=tiles", ["attention.mode=tiles", "Did you mean 'tile'", "token"]),
        ("attention.impl=tritn", ["attention.impl=tritn", "Did you mean 'triton'"]),
        ("attention.key_block=24", ["attention.key_block=24", "16, 32, 64 or 128"]),
        ("attention.query_tile=8", ["attention.query_tile=8", "16, 32 or 64"]),
        ("sparsity.k=64", ["sparsity.k=64", "window 64 + sinks 16", "sparsity.k=80"]),
        ("sparsity.k=250", ["sparsity.k=250", "multiple of the 16", "sparsity.k=240"]),
        ("sparsity.window=0", ["sparsity.window=0", "at least 1"]),
        ("model.layer_pattern=[gsaa]", ["'gsaa'", "Did you mean 'gsa'"]),
        ("model.layer_pattern=[dense,gsa]", ["only the last entry"]),
        ("model.layer_pattern=['dense:x']", ["'dense:x'", "positive count"]),
        ("model.layer_pattern=['dense:3']", ["3 layers", "model.n_layers=3"]),
        ("data.tokenizer=absent.json", ["absent.json", "data.tokenizer=bytes"]),
        ("data=text", ["data.paths="]),
        ("data=hf", ["data.path=FOLDER"]),
        ("train.resume=absent.ckpt", ["absent.ckpt", "train.resume=auto"]),
    ],
)
def test_refusals(typed, parts):
    message = problems(typed)
    for part in parts:
        assert part in message


def test_data_paths_must_match(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    good = f"data.paths=['{tmp_path}/*.txt']"
    validate(compose.load(["experiment=smoke", "data=text", good]))
    assert "*.md" in problems("data=text", f"data.paths=['{tmp_path}/*.md']")


def test_granularity_depends_on_the_mode():
    token = problems("attention.mode=token")  # smoke has blocks of 16 and tiles of 16
    assert "attention.key_block=1" in token and "attention.query_tile=1" in token
    block = problems("attention.mode=block")
    assert "query_tile" in block and "key_block=16" not in block


def test_adaptive_budget_bounds():
    message = problems("sparsity=adaptive_variance", "sparsity.k=512", "sparsity.k_max=256")
    assert "k_max=256" in message


def test_every_problem_is_reported_at_once():
    message = problems("train.steps=0", "optim.lr=-1", "trainer.precision=16")
    assert message.startswith("3 problems")


def test_plugin_hook_can_refuse_and_may_not_crash(plugin, monkeypatch):
    source = """
    from gsa_platform import hookimpl
    from gsa_platform.errors import UserError

    @hookimpl
    def gsa_validate(config):
        if config.seed == 1:
            raise UserError("seed=1 is refused by acme")
        if config.seed == 2:
            raise KeyError("oops")
    """
    monkeypatch.syspath_prepend(plugin("acme_validate", source))
    assert problems("seed=1") == "seed=1 is refused by acme"
    crashed = problems("seed=2")
    assert "acme_validate" in crashed and "KeyError" in crashed
    validate(compose.load(["experiment=smoke"]))


def test_capabilities_are_checked(plugin, monkeypatch):
    source = """
    from dataclasses import dataclass
    from gsa_platform import Capabilities, Component, hookimpl

    @dataclass
    class Config:
        name: str = "picky"

    @hookimpl
    def gsa_register_attention():
        return Component("picky", "m:C", Config, "", Capabilities(
            devices=("cuda",), dtypes=("bfloat16",), head_dims=(64, 128), varlen=False,
            backward=False, deterministic=False, needs=("no-such",)))
    """
    monkeypatch.syspath_prepend(plugin("picky", source))
    message = problems("attention=picky", "data.cross_document=false", "train.deterministic=true")
    parts = ["not on cpu", "float32", "head_dim=64 or 128", "backward", "apart", "deterministic"]
    for part in [*parts, "needs no-such"]:
        assert part in message


def test_validation_needs_no_torch():
    code = (
        "import sys; from gsa_platform import compose, validate;"
        "validate.validate(compose.load(['experiment=gsa_128k']));"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
