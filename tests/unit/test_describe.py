"""A run's log says what selects and what the objective's gradients come from, and why."""

from __future__ import annotations

import pytest
import torch

from gsa_kernels.dispatch import triton_reason
from gsa_platform import compose, registry
from gsa_platform.model.transformer import Transformer
from gsa_plugins.indexer.base import BlockIndexer

SMALL = ["experiment=smoke", "model.n_layers=2", "context=256", "tracking=none"]
FAST = "impl triton (the fastest here)"
POOLED = ["indexer=pooled", "indexer.pool=64"]

triton = pytest.mark.skipif(
    bool(triton_reason(torch.device("cuda"))), reason="no Triton to choose for a CUDA device"
)


def lines(device_type, *overrides):
    cfg = compose.load([*SMALL, *overrides])
    with torch.device("meta"):
        model = Transformer(cfg, 97, registry.get())
    said = model.describe(device_type)
    assert len(set(said)) == len(said)
    return {
        line.split(": ")[1]: line.partition(": ")[2].partition(": ")[2]
        for line in said
        if "attention" not in line
    }


CASES = [
    ([], FAST, FAST),
    (["objective=bias"], FAST, FAST),
    (["objective=none"], FAST, None),
    (["indexer.key_dtype=fp8"], FAST, FAST),
    (["indexer.dim=192"], "eager (PyTorch, because the kernels take up to 128 index", "of 128"),
    (["indexer.block_score=max"], FAST, "eager (PyTorch, because there is no kernel for the larg"),
    (POOLED, "triton (of the choice; PooledFactors are computed by PyTorch)", "of its own"),
    (["indexer=random", "objective=none"], "triton (of the choice; RandomScores", None),
    (["indexer=oracle", "objective=none"], "triton (of the choice; AttentionScores", None),
    (["indexer=strided", "objective=none"], "triton (of the choice; StridedScores", None),
    (["indexer=hierarchical", "objective=kl_bias"], FAST, FAST),
]


@triton
@pytest.mark.parametrize(("overrides", "selection", "objective"), CASES, ids=str)
def test_on_a_cuda_device(overrides, selection, objective):
    said = lines("cuda", *overrides)
    assert selection in said["selection"]
    assert objective in said["objective"] if objective else "objective" not in said


def test_on_a_cpu():
    said = lines("cpu")
    for slot in ("selection", "objective"):
        assert (
            said[slot]
            == "impl eager (PyTorch, because Triton kernels need a CUDA device, not cpu)"
        )


def test_layers_alike_share_a_line():
    with torch.device("meta"):
        model = Transformer(compose.load(SMALL), 97, registry.get())
    said = model.describe("cpu")
    assert len(said) == 3 and all(line.startswith("layers 0-1: ") for line in said)


def test_dense_attention_selects_nothing():
    assert lines("cpu", "attention=dense").keys() <= {"dense"}


def test_an_indexer_that_knows_nothing_before_it_runs_says_nothing(monkeypatch):
    from gsa_plugins.indexer.lightning import LightningIndexer

    monkeypatch.setattr(LightningIndexer, "outline", BlockIndexer.outline)
    assert not lines("cpu").keys() & {"selection", "objective"}


@triton
def test_what_is_said_is_what_select_decides(monkeypatch):
    """The same question, asked of the factors of a run."""
    from gsa_kernels.select import api

    cfg = compose.load([*SMALL, "model.n_layers=1"])
    model, asked = Transformer(cfg, 97, registry.get()), []
    real = api.choose
    monkeypatch.setattr(api, "choose", lambda impl, *args: asked.append(args) or real(impl, *args))
    model(torch.zeros(1, 256, dtype=torch.long))
    ((factors, spec, most),) = {id(a[0]): a for a in asked}.values()
    layer = model.blocks[0].attention
    outline = layer.indexer.outline(spec, layer.sparsity.max_keys)
    assert most == layer.sparsity.max_keys and type(outline) is type(factors)
    assert outline.q_BTJI.shape[2:] == factors.q_BTJI.shape[2:]
    assert outline.k_BSI.dtype == factors.k_BSI.dtype
    for name in ("scale", "activation", "block_score", "heads"):
        assert getattr(outline, name) == getattr(factors, name)
