"""From overrides to the resolved configuration."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from gsa_platform import compose, hardware
from gsa_platform.errors import UserError
from gsa_platform.hardware import Hardware

pytestmark = pytest.mark.usefixtures("fresh_registry")

CPU = Hardware("cpu", "CPU", 1, 16.0, 4, 16.0)
BIG_GPU = Hardware("cuda", "Test GPU", 1, 79.1, 16, 128.0)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    def use(found: Hardware) -> None:
        monkeypatch.setattr(hardware, "detect", lambda: found)

    use(CPU)
    return use


def error_of(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        compose.load(overrides)
    return str(caught.value)


def test_every_root_key_is_there():
    cfg = compose.load(["experiment=gsa_128k"])
    keys = """name seed context model attention indexer sparsity gate objective data optim train
              trainer tracking output_root run_dir hardware picked notes sweep plugins_path
              callbacks"""
    assert set(cfg) == set(keys.split())
    assert (cfg.name, cfg.context) == ("gsa_128k", 131072)
    assert (cfg.attention.name, cfg.indexer.name, cfg.gate.name) == (
        "gsa",
        "gated_lightning",
        "dual",
    )
    assert not OmegaConf.missing_keys(cfg)
    OmegaConf.to_yaml(cfg, resolve=True)


@pytest.mark.parametrize("model", ["nano", "micro", "small", "base", "paper_1b7"])
def test_models_are_consistent(model):
    cfg = compose.load([f"model={model}"]).model
    assert cfg.name == model
    assert cfg.n_heads % cfg.n_kv_heads == 0
    assert cfg.n_heads * cfg.head_dim == cfg.d_model


@pytest.mark.parametrize("group", ["experiment", "trainer", "data", "tracking", "optim"])
def test_every_choice_composes(group):
    for choice in compose.choices()[group]:
        cfg = compose.load([f"{group}={choice}"])
        if group == "experiment":
            assert cfg.name == choice
        else:
            assert cfg[group].name == choice


def test_preset_follows_the_machine(machine):
    cfg = compose.load(["experiment=gsa_128k"])
    assert cfg.picked.hardware == "cpu"
    assert cfg.picked.overrides == cfg.hardware.cpu
    machine(BIG_GPU)
    cfg = compose.load(["experiment=gsa_128k"])
    assert cfg.picked.hardware == "cuda_80gb" and "Test GPU" in cfg.picked.reason
    assert cfg.trainer.precision == "bf16-mixed"
    assert "cuda_80gb" in cfg.notes[0]


def test_typed_settings_win_over_the_preset(machine):
    machine(BIG_GPU)
    cfg = compose.load(["experiment=gsa_128k", "model=micro", "train.steps=7"])
    assert (cfg.model.name, cfg.train.steps) == ("micro", 7)
    assert not [o for o in cfg.picked.overrides if o.startswith(("model=", "train.steps="))]


def test_preset_can_be_forced_or_turned_off(machine):
    forced = compose.load(["experiment=gsa_128k", "picked.hardware=cuda_80gb"])
    assert forced.trainer.precision == "bf16-mixed"
    off = compose.load(["experiment=gsa_128k", "picked.hardware=none"])
    assert list(off.picked.overrides) == [] and off.picked.hardware == "none"
    assert "cuda_80gb" in error_of("experiment=gsa_128k", "picked.hardware=cuda_80")
    machine(BIG_GPU)
    on_cpu = compose.load(["experiment=gsa_128k", "trainer=cpu"])
    assert on_cpu.picked.hardware == "cpu" and "accelerator=cpu" in on_cpu.picked.reason


def test_preset_skips_settings_of_a_component_that_was_replaced():
    overrides = ["+hardware.cpu=['sparsity.k=512','train.steps=9']"]
    assert compose.load(overrides).sparsity.k == 512
    cfg = compose.load([*overrides, "sparsity=adaptive_variance"])
    assert cfg.sparsity.k == 512 and cfg.train.steps == 9
    cfg = compose.load([*overrides, "attention=dense", "sparsity=none"])
    assert list(cfg.picked.overrides) == ["train.steps=9"]


def test_dense_attention_empties_the_slots_and_says_so():
    cfg = compose.load(["experiment=smoke", "attention=dense"])
    assert {cfg.indexer.name, cfg.sparsity.name, cfg.objective.name} == {"none"}
    assert set(cfg.sparsity) == {"name"}
    assert any("indexer=none sparsity=none objective=none" in note for note in cfg.notes)
    assert cfg.gate.name == "dual"


@pytest.mark.parametrize("typed", ["indexer=relu_lightning", "sparsity.k=512", "objective=kl"])
def test_dense_attention_refuses_what_was_typed(typed):
    message = error_of("attention=dense", typed)
    assert typed.partition("=")[0] in message and "attention=flex or gsa" in message


def test_none_may_be_typed_for_dense():
    assert compose.load(["attention=dense", "indexer=none"]).indexer.name == "none"


@pytest.mark.parametrize("slot", ["indexer", "sparsity"])
def test_sparse_attention_needs_its_slots(slot):
    message = error_of(f"{slot}=none")
    assert f"{slot}=none" in message and "attention=dense" in message


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        ("experiment=gsa_12k", ["Did you mean 'gsa_128k'", "smoke"]),
        ("experiment=null", ["gsa_128k", "smoke"]),
        ("attention=gsaa", ["Did you mean 'gsa'", "dense"]),
        ("attentoin=gsa", ["Did you mean 'attention'"]),
        ("train.stepz=3", ["Did you mean 'steps'", "batch_size"]),
        ("+train.stepz=3", ["Did you mean 'steps'"]),
        ("+sead=3", ["Did you mean 'seed'"]),
        ("attention.key_blok=3", ["attention=gsa", "Did you mean 'key_block'"]),
        ("train.steps=many", ["train.steps=many", "needs a whole number (default 100)"]),
        ("seed.x=1", ["'seed' is a value"]),
        ("a b", ["Cannot read 'a b'", "key=value"]),
        ("~gate", ["gate"]),
        ("model=nano,base", ["--multirun"]),
    ],
)
def test_mistakes_name_the_choices(typed, parts):
    message = error_of(typed)
    for part in parts:
        assert part in message
    assert "object_type" not in message and "search path" not in message


def test_free_keys_can_be_added_where_they_are_free():
    assert compose.load(["+tracking.tags.team=red"]).tracking.tags.team == "red"


def test_one_off_plugin_gets_a_typed_group(plugin, monkeypatch):
    file = plugin("one_off_typed") / "one_off_typed.py"
    monkeypatch.setenv("GSA_PLUGIN_PATH", "")  # restored after load sets it
    cfg = compose.load([f"plugins_path={file}", "attention=one_off_typed", "attention.top_k=8"])
    assert cfg.attention.top_k == 8 and cfg.indexer.name == "none"
    message = error_of(f"plugins_path={file}", "attention=one_off_typed", "attention.top_k=x")
    assert "attention.top_k=x: needs a whole number (default 64)" in message
