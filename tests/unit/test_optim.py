from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from gsa_platform.errors import UserError
from gsa_platform.optim import (
    build_optimizer,
    build_schedule,
    lr_factor,
    parameter_groups,
    warmup_steps,
)


def config(**optim):
    defaults = {
        "lr": 1e-3,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.1,
        "clip": 1.0,
        "indexer_lr_multiplier": 3.0,
        "schedule": "cosine",
        "warmup_steps": 4,
        "decay_fraction": 0.2,
        "min_lr_ratio": 0.1,
    }
    cfg = OmegaConf.create({"optim": {**defaults, **optim}, "train": {"steps": 20}})
    OmegaConf.set_struct(cfg, True)
    return cfg


class HeadNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2, 4))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.norm = nn.RMSNorm(8)
        self.head_norm = HeadNorm()
        self.key_indexer = nn.Linear(8, 4)
        self.gate_bias = nn.Parameter(torch.zeros(2, 4))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)


def names(groups):
    return {group["name"]: sorted(group["param_names"]) for group in groups}


def test_groups_hold_every_parameter_once():
    model = Model()
    groups = parameter_groups(model, config().optim)
    params = [id(p) for group in groups for p in group["params"]]
    assert sorted(params) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    found = names(groups)
    assert found["decay"] == ["layers.0.proj.weight", "layers.1.proj.weight"]
    assert found["indexer_decay"] == [f"layers.{i}.key_indexer.weight" for i in (0, 1)]
    assert found["indexer_no_decay"] == [f"layers.{i}.key_indexer.bias" for i in (0, 1)]
    assert "embed.weight" in found["no_decay"]  # tied to the head: still an embedding
    assert "layers.0.head_norm.gain" in found["no_decay"]
    assert "layers.1.gate_bias" in found["no_decay"]


def test_untied_head_decays():
    model = Model()
    model.head.weight = nn.Parameter(torch.zeros(16, 8))
    assert "head.weight" in names(parameter_groups(model, config().optim))["decay"]


def test_group_settings():
    groups = {g["name"]: g for g in parameter_groups(Model(), config().optim)}
    assert groups["decay"]["lr"] == groups["no_decay"]["lr"] == 1e-3
    assert groups["indexer_decay"]["lr"] == pytest.approx(3e-3)
    assert groups["indexer_decay"]["weight_decay"] == groups["decay"]["weight_decay"] == 0.1
    assert groups["indexer_no_decay"]["weight_decay"] == groups["no_decay"]["weight_decay"] == 0


def test_no_empty_group_without_indexer():
    assert set(names(parameter_groups(nn.Linear(2, 2), config().optim))) == {"decay", "no_decay"}


def test_optimizer_from_namespace_and_from_config():
    plain = SimpleNamespace(
        optim=SimpleNamespace(**config().optim), train=SimpleNamespace(steps=20)
    )
    for cfg in (config(), plain):
        optimizer = build_optimizer(Model(), cfg)
        assert optimizer.defaults["betas"] == (0.9, 0.95)
        schedule = build_schedule(optimizer, cfg)
        assert schedule.get_last_lr()[0] == pytest.approx(0.25e-3)


def test_indexer_keeps_its_multiple_through_the_schedule():
    optimizer = build_optimizer(Model(), config())
    schedule = build_schedule(optimizer, config())
    for _ in range(10):
        optimizer.step()
        schedule.step()
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["indexer_decay"] == pytest.approx(3 * rates["decay"])
    assert 1e-4 < rates["decay"] < 1e-3


def factors(schedule, steps=20, **kwargs):
    return [lr_factor(i, schedule=schedule, steps=steps, **kwargs) for i in range(steps + 1)]


def test_warmup_reaches_the_peak_and_never_starts_at_zero():
    assert factors("cosine", warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors("cosine")[0] == 1.0


def test_cosine():
    values = factors("cosine", warmup_steps=4, min_lr_ratio=0.2)
    assert values[12] == pytest.approx(0.6)
    assert values[20] == pytest.approx(0.2)
    assert all(a >= b for a, b in pairwise(values[4:]))
    assert lr_factor(50, schedule="cosine", steps=20, min_lr_ratio=0.2) == pytest.approx(0.2)


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.55), ("sqrt", 1 - 0.9 * 0.5**0.5)])
def test_wsd(shape, middle):
    values = factors("wsd", warmup_steps=4, decay_fraction=0.4, decay_shape=shape)
    assert values[4:13] == [1.0] * 9
    assert values[16] == pytest.approx(middle)
    assert values[20] == pytest.approx(0.1)


def test_constant():
    assert set(factors("constant", warmup_steps=1)) == {1.0}


@pytest.mark.parametrize(
    ("wanted", "steps", "expected"),
    [(0, 10, 0), (0.1, 16, 2), (0.1, 4, 0), (1, 10, 1), (20, 9, 20)],
)
def test_warmup_is_in_steps_or_below_one_a_share_of_them(wanted, steps, expected):
    assert warmup_steps(wanted, steps) == expected


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_warmup_longer_than_the_run(schedule):
    assert factors(schedule, steps=3, warmup_steps=10)[:3] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"schedule": "cosin"}, "cosine, wsd, constant"),
        ({"min_lr_ratio": 2.0}, "min_lr_ratio"),
        ({"decay_fraction": -0.1}, "decay_fraction"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"decay_shape": "cubic"}, "sqrt, linear"),
    ],
)
def test_bad_settings_are_user_errors(bad, message):
    with pytest.raises(UserError, match=message):
        build_schedule(build_optimizer(nn.Linear(2, 2), config()), config(**bad))
