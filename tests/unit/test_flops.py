import subprocess
import sys
from types import SimpleNamespace

import pytest

from gsa_platform.model import flops
from gsa_platform.model.flops import (
    dimensions,
    flops_per_token,
    indexer_scoring_flops,
    mean_keys,
    parameter_count,
    training_memory,
)


def model(**kwargs):
    defaults = {
        "d_model": 64,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 0,
        "ffn_dim": 0,
        "qk_norm": False,
        "tie_embeddings": True,
    }
    return SimpleNamespace(**{**defaults, **kwargs})


def test_zeros_are_resolved():
    assert dimensions(model()).head_dim == 16
    assert dimensions(model()).ffn_dim == 192  # 8/3 * 64 = 170.7, rounded up to 64
    assert dimensions(model(d_model=48, ffn_dim=100)).ffn_dim == 100
    assert dimensions(model(d_model=24)).ffn_dim == 64


def test_dense_flops_by_hand():
    cost = flops_per_token(model(), context=128, vocab=100)
    assert cost.projections == 3 * 2 * (64 * 64 * 2 + 64 * 32 * 2)
    assert cost.attention == 3 * 4 * 64 * 64  # 64 query channels over 128 / 2 keys
    assert cost.ffn == 3 * 2 * 3 * 64 * 192
    assert cost.head == 2 * 64 * 100
    assert cost.indexer == cost.gates == 0
    assert cost.forward == 73728 + 49152 + 221184 + 12800
    assert cost.training == 3 * cost.forward
    assert isinstance(cost.training, int)


def test_matrices_cost_two_flops_per_weight():
    cost = flops_per_token(model(), context=128, vocab=100)
    norms = 3 * 2 * 64 + 64
    assert cost.forward - cost.attention == 2 * (parameter_count(model(), 100) - norms)


def test_sparse_flops():
    cost = flops_per_token(model(), 128, 100, keys_per_query=16, indexer_flops=7)
    dense = flops_per_token(model(), 128, 100)
    assert cost.attention == 3 * 4 * 64 * 16
    assert cost.indexer == 21
    assert dense.forward - cost.forward == 3 * 4 * 64 * (64 - 16) - 21
    mixed = flops_per_token(model(), 128, 100, 16, sparse_layers=2, indexer_flops=7)
    assert mixed.attention == 2 * 4 * 64 * 16 + 4 * 64 * 64
    assert mixed.indexer == 14
    gated = flops_per_token(model(), 128, 100, gate_parameters=10)
    assert gated.forward - dense.forward == 60


def test_mean_keys_is_the_causal_average():
    assert mean_keys(10, 4) == sum(min(i + 1, 4) for i in range(10)) / 10
    assert mean_keys(10, 99) == 5.5


def test_indexer_scoring():
    single = indexer_scoring_flops(64, heads=4, dim=8, context=128)
    assert single == 2 * 64 * (32 + 8 + 4) + 2 * 32 * 64
    pooled = indexer_scoring_flops(64, heads=4, dim=8, context=128, key_block=64)
    assert single - pooled == 2 * 32 * 64 - 2 * 32


def test_parameter_count():
    tied, untied = parameter_count(model(), 100), parameter_count(model(tie_embeddings=False), 100)
    assert untied - tied == 64 * 100
    assert parameter_count(model(qk_norm=True), 100) - tied == 3 * 2 * 16
    assert parameter_count(model(), 100, gate_parameters=5, indexer_parameters=2) - tied == 21


def test_memory_states():
    count = parameter_count(model(), 100)
    full = training_memory(model(), 128, 100)
    assert (full.parameters, full.gradients, full.optimizer) == (4 * count, 4 * count, 8 * count)
    mixed = training_memory(model(), 128, 100, precision="bf16-mixed")
    assert mixed.parameters == 6 * count
    true = training_memory(model(), 128, 100, precision="bf16-true")
    assert true.parameters + true.gradients + true.optimizer == 8 * count
    assert full.total == sum(
        (full.parameters, full.gradients, full.optimizer, full.activations, full.loss)
    )


def test_memory_activations():
    small, large = (training_memory(model(), 128, 100, batch_size=b) for b in (1, 4))
    assert large.activations == 4 * small.activations
    checkpointed = training_memory(model(n_layers=12), 128, 100, checkpointing=True)
    plain = training_memory(model(n_layers=12), 128, 100)
    assert checkpointed.activations < plain.activations / 4


def test_unknown_precision():
    with pytest.raises(ValueError, match="bf16-mixed"):
        training_memory(model(), 128, 100, precision="fp8")


def test_module_needs_no_torch():
    code = f"""
import importlib.util, sys
sys.modules["torch"] = None
spec = importlib.util.spec_from_file_location("flops", {flops.__file__!r})
module = sys.modules["flops"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.mean_keys(10, 99))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "5.5\n", done.stderr
