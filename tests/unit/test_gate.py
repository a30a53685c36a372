"""Where gates start, what they can reach, and their shapes."""

from __future__ import annotations

import pytest
import torch

from gsa_platform.contracts import LayerDims
from gsa_platform.testing.case import Case, layers
from gsa_platform.testing.gradients import loss_of
from gsa_plugins import configs as c
from gsa_plugins.gate import ACTIVATIONS, ProjectedGate

DIMS = LayerDims(16, 4, 2, 8, context=100)
RANGES = {"sigmoid": (0, 1), "silu": (-0.279, float("inf")), "tanh": (0, 2)}
# activation, initial bias, where the gate starts
STARTS = [
    ("sigmoid", 0.0, 0.5),
    ("sigmoid", 2.0, 0.8808),
    ("silu", 1.278, 1.0),
    ("tanh", 0.0, 1.0),
]


@pytest.mark.parametrize(("activation", "bias", "start"), STARTS)
def test_the_bias_sets_where_a_gate_starts(activation, bias, start):
    gate = ProjectedGate(c.DualGateConfig(activation=activation, bias=bias), DIMS)
    values = gate(torch.zeros(1, 3, 16))
    for value in (values.value_BTKE, values.output_BTHE):
        torch.testing.assert_close(value, torch.full_like(value, start), atol=1e-3, rtol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ranges(activation):
    z = torch.linspace(-30, 30, 2001, dtype=torch.float64)
    low, high = RANGES[activation]
    value = ACTIVATIONS[activation](z)
    assert value.min() >= low and value.max() <= high and value.max() > 0.99 * min(high, 30)


@pytest.mark.parametrize("name", ["value", "output", "dual"])
@pytest.mark.parametrize("granularity", ["elementwise", "headwise"])
def test_which_gates_and_how_wide(name, granularity):
    config = {"value": c.ValueGateConfig, "output": c.OutputGateConfig, "dual": c.DualGateConfig}
    gate = ProjectedGate(config[name](granularity=granularity), DIMS)
    values, width = gate(torch.randn(2, 5, 16)), 8 if granularity == "elementwise" else 1
    assert (values.value_BTKE is not None) == (name in ("value", "dual"))
    assert (values.output_BTHE is not None) == (name in ("output", "dual"))
    if values.value_BTKE is not None:
        assert values.value_BTKE.shape == (2, 5, 2, width)
    if values.output_BTHE is not None:
        assert values.output_BTHE.shape == (2, 5, 4, width)


@pytest.mark.parametrize("setting", [{"activation": "relu"}, {"granularity": "layer"}])
def test_bad_settings_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting.values()))):
        ProjectedGate(c.ValueGateConfig(**setting), DIMS)


def test_a_fused_gate_changes_no_bit_of_a_model_on_a_cpu():
    case = Case("attention", "gsa", beside=("gate=dual",), mode="tile")
    model, text = case.model("model.n_layers=1"), case.text()
    layer = layers(model)[0]
    found = []
    for fused in (True, False):
        assert layer.fused_gate or not fused
        layer.fused_gate = fused
        model.zero_grad()
        loss = loss_of(case, model, text)
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 8
    assert all(torch.equal(a, b) for a, b in zip(*found))
