import math

import pytest
import torch
from torch import nn

from gsa_platform.metrics import (
    FirstTokenAttention,
    GateMean,
    LayerMean,
    PositionNLL,
    SelectedKeys,
    SelectionRecall,
    TokenNLL,
    measured_matmul_flops,
    model_flops_utilisation,
    peak_flops,
)


def test_nll_weighs_tokens_not_batches():
    nll = TokenNLL()
    nll.update(torch.tensor(10.0), torch.tensor(10))
    nll.update(90.0, 30)
    assert float(nll.compute()) == 2.5
    assert float(nll.perplexity()) == pytest.approx(math.exp(2.5))
    assert float(nll.bits_per_byte(4.0)) == pytest.approx(2.5 / math.log(2) / 4)


def test_nll_is_nan_without_tokens():
    nll = TokenNLL()
    nll.update(0.0, 0)
    assert math.isnan(float(nll.compute()))


def test_nll_adds_many_small_batches_exactly():
    nll = TokenNLL()
    nll.update(2.0**25, 1)
    for _ in range(64):
        nll.update(torch.tensor(1.0), 1)
    assert float(nll.nll_sum) == 2**25 + 64  # float32 would stay at 2^25


def test_states_keep_their_dtype_below_a_bf16_model():
    model = nn.Module()
    model.linear = nn.Linear(2, 2)
    model.nll = TokenNLL()
    model.to(dtype=torch.bfloat16)
    assert model.linear.weight.dtype == torch.bfloat16
    model.nll.update(torch.tensor(1.0), 1001)
    model.nll.update(torch.tensor(1.0), 1)
    assert model.nll.nll_sum.dtype == torch.float64
    assert int(model.nll.n_tokens) == 1002
    model.nll.reset()
    assert model.nll.nll_sum.dtype == torch.float64


def test_forward_merges_batches():
    nll = TokenNLL()
    assert float(nll(4.0, 2)) == 2.0
    assert float(nll(12.0, 2)) == 6.0
    assert float(nll.compute()) == 4.0


def test_position_nll_buckets():
    metric = PositionNLL(context=10)
    assert metric.buckets == [(0, 2), (2, 4), (4, 8), (8, 10)]
    nll = torch.arange(10.0).repeat(2, 1)
    scored = torch.ones(2, 10, dtype=torch.bool)
    scored[:, 9] = False
    nll[:, 9] = float("nan")  # an unscored token may hold anything
    metric.update(nll, torch.arange(10), scored)
    assert metric.compute().tolist() == [0.5, 2.5, 5.5, 8.0]
    assert metric.n_tokens.tolist() == [4, 4, 8, 2]


def test_position_nll_empty_bucket_is_nan():
    metric = PositionNLL(context=8)
    metric.update(torch.tensor([3.0]), torch.tensor([5]))
    assert torch.isnan(metric.compute()).tolist() == [True, True, False]


def test_model_flops_utilisation():
    assert model_flops_utilisation(1000.0, 6e9, 12e12, devices=2) == pytest.approx(0.25)
    assert model_flops_utilisation(1.0, 5.0, None) is None


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA RTX A1000", None),
        ("Some Accelerator", None),
    ],
)
def test_peak_flops(name, tera):
    assert peak_flops(name) == (None if tera is None else tera * 1e12)


def test_measured_matmul_rate_is_plausible():
    assert 1e8 < measured_matmul_flops(size=128, seconds=0.0) < 1e15


def test_selected_keys():
    metric = SelectedKeys()
    metric.update(torch.tensor([[1, 2, 3, 3], [1, 1, 2, 4]]), torch.arange(1, 5))
    result = {name: float(value) for name, value in metric.compute().items()}
    assert result == {"mean": 17 / 8, "fraction": 17 / 20, "min": 1.0, "max": 4.0}
    metric.reset()
    metric.update(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    assert all(math.isnan(float(value)) for value in metric.compute().values())


def test_selection_recall():
    metric = SelectionRecall(n_layers=2)
    metric.update(torch.tensor(3.0), 4, hits=1, wanted=2, layer=0)
    metric.update(1.0, 4, hits=2, wanted=2, layer=1)
    result = metric.compute()
    assert float(result["recall"]) == 0.5
    assert result["recall_layers"].tolist() == [0.75, 0.25]
    assert float(result["overlap"]) == 0.75
    assert result["overlap_layers"].tolist() == [0.5, 1.0]


def test_layer_mean():
    metric = LayerMean(n_layers=3)
    metric.update(torch.zeros(0), layer=1)
    assert all(math.isnan(float(value)) for value in metric.compute().values())
    metric.update(torch.tensor(-0.5), layer=0)
    other = LayerMean(n_layers=3)  # of another rank
    other.update(torch.tensor([-0.25, -0.75]), layer=2)
    other.update(torch.tensor(-0.1), layer=0)
    metric.merge_state(other)
    result = {name: float(value) for name, value in metric.compute().items()}
    assert result == pytest.approx({"mean": -1.6 / 4, "max": -0.3})


def test_gate_mean():
    metric = GateMean(n_layers=2)
    metric.update(value=torch.tensor([0.05, 0.15]), layer=0)
    metric.update(value=torch.tensor([[0.5, 0.7]]), layer=1)
    result = metric.compute()
    assert set(result) == {"value_mean", "value_small", "value_mean_layers"}
    assert float(result["value_mean"]) == pytest.approx(0.35)
    assert float(result["value_small"]) == 0.25
    assert result["value_mean_layers"].tolist() == pytest.approx([0.1, 0.6])
    metric.update(output=torch.full((3,), 0.25))
    assert float(metric.compute()["output_mean"]) == 0.25


def test_a_gate_that_averages_zero_is_not_closed():
    metric = GateMean()
    metric.update(value=torch.tensor([-0.25, 0.25, -0.05]))
    result = metric.compute()
    assert float(result["value_mean"]) == pytest.approx(0.55 / 3)
    assert float(result["value_small"]) == pytest.approx(1 / 3)


def uniform_first_token(length: int) -> float:
    """Mean share of position 0 over rows 1..T-1 that attend evenly: (H_T - 1) / (T - 1)."""
    return sum(1.0 / (i + 1) for i in range(1, length)) / (length - 1)


def uniform_first_token_tail(length: int) -> float:
    """The same over the rows i >= T/2 only."""
    start = (length + 1) // 2
    return sum(1.0 / (i + 1) for i in range(start, length)) / (length - start)


def test_uniform_references_match_the_published_values():
    assert uniform_first_token(64) == pytest.approx(0.059, abs=5e-4)
    assert uniform_first_token(256) == pytest.approx(0.0201, abs=5e-5)
    assert uniform_first_token(1024) == pytest.approx(0.0064, abs=5e-5)
    assert uniform_first_token_tail(1024) == pytest.approx(1.39 / 1024, rel=5e-3)


def test_uniform_attention_meets_its_reference():
    length = 256
    metric = FirstTokenAttention(length, n_layers=2)
    rows = torch.arange(length)
    for layer in range(2):
        metric.update((1.0 / (rows + 1)).expand(2, 3, -1), rows, layer)
    result = metric.compute()
    assert float(result["mean"]) == pytest.approx(uniform_first_token(length), rel=1e-6)
    assert float(result["uniform"]) == pytest.approx(uniform_first_token(length))
    assert float(result["tail"]) == pytest.approx(uniform_first_token_tail(length), rel=1e-6)
    assert float(result["uniform_tail"]) == pytest.approx(uniform_first_token_tail(length))
    assert float(result["early"]) == pytest.approx(uniform_first_token(64), rel=1e-6)
    assert "selected" not in result


def test_first_token_attention_by_layer():
    metric = FirstTokenAttention(length=4, n_layers=2)
    rows = torch.arange(4)
    metric.update(torch.tensor([1.0, 0.2, 0.4, 0.6]), rows, 0)  # row 0 must not count
    metric.update(
        torch.tensor([1.0, 0.0, 0.0, 0.3]), rows, 1, torch.tensor([True, False, False, True])
    )
    result = metric.compute()
    assert result["layers"].tolist() == pytest.approx([0.4, 0.1])
    assert result["tail_layers"].tolist() == pytest.approx([0.5, 0.15])
    assert float(result["mean"]) == pytest.approx(0.25)
    assert float(result["max"]) == pytest.approx(0.4)
    assert float(result["selected"]) == pytest.approx(1 / 3)


def test_first_token_attention_is_nan_when_empty():
    metric = FirstTokenAttention(length=4, n_layers=2)
    metric.update(torch.tensor([1.0]), torch.tensor([0]))
    assert math.isnan(float(metric.compute()["max"]))
