"""Index keys of one byte a channel: how they round, what they choose, learn and take to cache."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from kernel_cases import granularity_id, make_factors, make_selection
from test_triton_select import (
    DEVICE,
    DTYPES,
    assert_same_choice,
    docs_of,
    documents,
    low,
    whole_numbers,
)

from gsa_kernels.bench.verify import recall
from gsa_kernels.index_score.api import (
    FP8,
    HierarchicalFactors,
    IndexFactors,
    PooledFactors,
    fp8_keys,
    scores_at,
)
from gsa_kernels.indexer_loss.api import dense_kl
from gsa_kernels.select.api import select
from gsa_kernels.selection import SelectionSpec
from gsa_platform import compose, registry
from gsa_platform.errors import UserError
from gsa_platform.model.attention_layer import LayerCache
from gsa_platform.model.transformer import Transformer
from gsa_platform.validate import validate

kernel = pytest.mark.kernel


def packed(factors):
    """The same factors with FP8 keys, and with their values in the type of the queries."""
    with torch.no_grad():
        k = fp8_keys(factors.k_BSI)
    return replace(factors, k_BSI=k), replace(factors, k_BSI=k.to(factors.q_BTJI.dtype))


def of_kind(kind, factors, **settings):
    held = {f.name: getattr(factors, f.name) for f in fields(IndexFactors)}
    return kind(**held, **settings)


def test_rounding():
    x = torch.tensor([0.0, 2**-10, 1.06, 1.07, -17.0, 447.0, 500.0, 1e9, -torch.inf])
    with torch.no_grad():
        got = fp8_keys(x.bfloat16())
    assert got.dtype == FP8
    expected = [0.0, 0.0, 1.0, 1.125, -16.0, 448.0, 448.0, 448.0, -448.0]
    assert got.float().tolist() == expected
    with torch.no_grad():
        assert fp8_keys(torch.tensor([torch.nan])).float().isnan().all()
        k = torch.randn(4096, generator=torch.Generator().manual_seed(0))
        near = fp8_keys(k).float()
    assert ((near - k).abs() <= k.abs() / 16 + 2**-10).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_training_sees_the_rounded_values_and_moves_the_unrounded(dtype):
    k = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    k = k.requires_grad_()
    seen = fp8_keys(k)
    with torch.no_grad():
        assert torch.equal(seen, fp8_keys(k).to(dtype)) and seen.dtype == dtype
    weight = torch.linspace(-1, 1, seen.numel()).view_as(seen).to(dtype)
    (seen * weight).sum().backward()
    assert torch.equal(k.grad, weight)


@pytest.mark.parametrize("block_score", ["mean", "max"])
def test_the_objective_moves_the_unrounded_keys(block_score):
    factors = make_factors(60, block_score=block_score)
    spec = SelectionSpec(4, 4, window=7, sinks=3)
    g = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, 60, 2, 8, generator=g, dtype=torch.float64) for _ in range(2))

    def gradient(index_k, kept):
        index_k = index_k.detach().requires_grad_()
        f = replace(factors, k_BSI=fp8_keys(index_k) if kept else index_k)
        loss = dense_kl(f, q, k, spec, torch.tensor([7, 12]), None, "log")
        return loss, torch.autograd.grad(loss, index_k)[0]

    loss, got = gradient(factors.k_BSI, True)
    same, expected = gradient(packed(factors)[1].k_BSI, False)
    assert torch.equal(loss, same) and torch.equal(got, expected) and got.abs().sum() > 0


# Granularity, how a block is scored, tokens, budget.
CHOICES = [
    ((1, 1), "mean", 30, 18),
    ((4, 1), "mean", 40, 24),
    ((16, 16), "max", 110, 45),
    ((5, 7), "mean", 110, 45),
]


@documents
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("granularity", "block_score", "length", "k"), CHOICES, ids=str)
@kernel
def test_kernels_read_the_bytes(granularity, block_score, length, k, dtype, documents):
    """Bit for bit the choice that the same values in the queries' type give; the eager one up to
    scores that are nearly equal."""
    pytest.importorskip("triton")
    factors, wide = packed(low(make_factors(length, block_score=block_score), dtype))
    spec, docs = SelectionSpec(*granularity, window=7, sinks=3), docs_of(length, documents)
    got, same, eager = (
        select(f, spec, k, k, length, docs, impl=impl).selection
        for f, impl in ((factors, "triton"), (wide, "triton"), (factors, "eager"))
    )
    assert torch.equal(got.blocks_BHQN, same.blocks_BHQN) and (got.blocks_BHQN >= 0).any()
    assert_same_choice(got, eager, factors, docs)


@pytest.mark.parametrize("granularity", [(1, 2), (4, 4)], ids=granularity_id)
@kernel
def test_kernels_choose_as_pytorch_does(granularity):
    """Bit for bit, of scores that every order of summation gives alike."""
    pytest.importorskip("triton")
    factors, _ = packed(low(whole_numbers(70), torch.float16))
    spec, docs = SelectionSpec(*granularity, window=7, sinks=3), docs_of(70, True)
    made = [
        select(factors, spec, 40, 40, 70, docs, impl=impl).selection.blocks_BHQN
        for impl in ("triton", "eager", "reference")
    ]
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
    assert (made[0] >= 0).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pooling", ["mean", "max", "bound"])
@pytest.mark.parametrize("granularity", [(1, 2), (4, 4)], ids=granularity_id)
@kernel
def test_coarse_kernels_read_the_bytes(granularity, pooling, dtype):
    pytest.importorskip("triton")
    settings = {"pool": 8, "survivors": 3, "pooling": pooling}
    coarse = of_kind(HierarchicalFactors, low(make_factors(50), dtype), **settings)
    spec, docs = SelectionSpec(*granularity, window=7, sinks=3), docs_of(50, True)
    factors, wide = packed(coarse)
    got, same, eager = (
        select(f, spec, 22, 22, 50, docs, impl=impl).selection.blocks_BHQN
        for f, impl in ((factors, "triton"), (wide, "triton"), (factors, "eager"))
    )
    assert torch.equal(got, same) and recall(got, eager) > 0.98 and (got >= 0).any()


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("kind", ["exact", "max", "pooled", "hierarchical"])
def test_slow_ways_read_the_bytes(kind, impl):
    factors = make_factors(60, block_score="max" if kind == "max" else "mean")
    if kind == "pooled":
        factors = of_kind(PooledFactors, factors, pool=8)
    elif kind == "hierarchical":
        factors = of_kind(HierarchicalFactors, factors, pool=8, survivors=2)
    factors, wide = packed(factors)
    spec, docs = SelectionSpec(4, 2, window=7, sinks=3), docs_of(60, True)
    got, same = (
        select(f, spec, 30, 30, 60, docs, impl=impl).selection.blocks_BHQN for f in (factors, wide)
    )
    assert torch.equal(got, same) and (got >= 0).any()


@pytest.mark.parametrize("granularity", [(1, 1), (16, 16)], ids=granularity_id)
def test_scores_of_a_selection_read_the_bytes(granularity):
    """As the objective `bias` takes them while decoding."""
    factors, wide = packed(low(make_factors(100), torch.float32))
    selection = make_selection(100, granularity)
    selection = replace(selection, blocks_BHQN=selection.blocks_BHQN.to(DEVICE))
    assert torch.equal(scores_at(factors, selection), scores_at(wide, selection))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@kernel
def test_the_kernel_of_listed_scores_reads_the_bytes(dtype):
    pytest.importorskip("triton")
    from gsa_kernels.index_score import at_ops

    factors, wide = packed(low(make_factors(40), dtype))
    blocks = make_selection(40, (1, 1), budget=20).blocks_BHQN.to(DEVICE)
    made = []
    for f in (factors, wide):
        q = f.q_BTJI.clone().requires_grad_()
        args = (f.k_BSI, f.weight_BTJ, f.bias_J, blocks, None, 1, f.scale, True)
        scores = at_ops.listed_scores(q, *args)
        made.append((scores, *torch.autograd.grad(scores[blocks >= 0].sum(), q)))
    assert made[0][1].abs().sum() > 0
    rough = 0 if DEVICE == "cpu" else 2e-3
    for a, b in zip(*made):  # a GPU may add up what is converted in another order
        torch.testing.assert_close(a, b, rtol=rough, atol=rough)


@kernel
def test_keys_are_converted_for_devices_that_cannot_read_them(monkeypatch):
    pytest.importorskip("triton")
    from gsa_kernels.index_score import triton_launch

    with torch.no_grad():
        k = fp8_keys(torch.randn(2, 3, 4))
    assert triton_launch.readable(k, torch.bfloat16) is k
    monkeypatch.setattr(triton_launch, "_reads_fp8", lambda device: False)
    assert torch.equal(triton_launch.readable(k, torch.bfloat16), k.bfloat16())
    held = k.bfloat16()
    assert triton_launch.readable(held, torch.float32) is held


@pytest.mark.parametrize("key_block", [1, 16])
@pytest.mark.parametrize("size", [1 / 16, 1.0, 16.0])
def test_recall_of_the_exact_choice(size, key_block):
    """Random keys are the worst case: the scores around the last one chosen lie closest."""
    factors = make_factors(1500, width=64, batch=1)
    factors = replace(factors, k_BSI=factors.k_BSI * size, scale=factors.scale / size)
    spec = SelectionSpec(key_block, 50, window=32, sinks=16)
    got, exact = (
        select(f, spec, 400, 400, 1500).selection.blocks_BHQN
        for f in (packed(factors)[0], factors)
    )
    found = recall(got, exact)
    assert 0.98 < found < 1, found


# Settings

SMALL = ["experiment=smoke", "model.n_layers=1", "context=256", "sparsity.k=128"]
SMALL += ["sparsity.window=8", "sparsity.sinks=4", "indexer.dim=16", "tracking=none"]
SMALL += ["attention.key_block=0", "attention.query_tile=0"]


def build(*overrides):
    cfg = compose.load([*SMALL, *overrides])
    validate(cfg)
    torch.manual_seed(0)
    return cfg, Transformer(cfg, 97, registry.get())


@pytest.mark.parametrize("mode", ["token", "block", "tile"])
def test_decoding_keeps_a_byte_a_channel_and_gives_what_one_forward_gives(mode):
    cfg, model = build(f"attention.mode={mode}", "indexer.key_dtype=fp8")
    _, other = build(f"attention.mode={mode}")
    text = torch.randint(97, (2, 200), generator=torch.Generator().manual_seed(0))
    held = []
    with torch.no_grad():
        whole = model(text).hidden_BTD
        for one in (model, other):
            cache, pieces = one.new_cache(), []
            for low_, high in (
                (0, 150),
                (150, 151),
                (151, 195),
                *((i, i + 1) for i in range(195, 200)),
            ):
                pieces.append(one(text[:, low_:high], cache=cache).hidden_BTD)
            keys = cache[0].index_k_BSI
            held.append(keys.numel() * keys.element_size())
            if one is model:
                assert keys.dtype == FP8
                torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-5)
    assert held[0] == 2 * 200 * cfg.indexer.dim and held[1] == 4 * held[0]
    # Training chooses from the same keys.
    torch.testing.assert_close(model(text).hidden_BTD, whole, rtol=0, atol=1e-5)


def test_a_cache_filled_without_gradients_goes_on_with_them():
    cache = LayerCache()
    k = torch.randn(2, 5, 4, requires_grad=True)
    with torch.no_grad():
        first = cache.extend("index_k_BSI", fp8_keys(k))
    whole = cache.extend("index_k_BSI", fp8_keys(k))
    assert whole.dtype == torch.float32 and torch.equal(whole[:, :5], first.float())
    with torch.no_grad():
        whole = cache.extend("index_k_BSI", fp8_keys(k))
    assert torch.equal(whole[:, 10:], first.float())


def test_settings():
    from omegaconf import OmegaConf

    for name in ("gated_lightning", "relu_lightning", "pooled", "hierarchical"):
        cfg, model = build(f"indexer={name}", "indexer.key_dtype=fp8")
        assert model.blocks[0].attention.indexer.straight_through
        again = OmegaConf.create(OmegaConf.to_yaml(cfg, resolve=True))
        assert again.indexer.key_dtype == "fp8"
        Transformer(again, 97, registry.get())
    wrong = ["indexer.key_dtype=int8"]
    with pytest.raises(UserError, match="key_dtype=int8 is not one of auto, fp8"):
        build(*wrong)
    with pytest.raises(UserError, match="key_dtype='int8': choose auto or fp8"):
        Transformer(compose.load([*SMALL, *wrong]), 97, registry.get())
