"""Score functions besides the lightning one: pooled, coarse to fine, and the controls."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace

import pytest
import torch
from kernel_cases import granularity_id, make_documents, make_factors, make_selection
from torch.utils.flop_counter import FlopCounterMode

from gsa_kernels.attention_mass import probe
from gsa_kernels.index_score.api import (
    AttentionScores,
    BlockScores,
    HierarchicalFactors,
    IndexFactors,
    PooledFactors,
    RandomScores,
    StridedScores,
    scores_at,
)
from gsa_kernels.index_score.pooled import coarse_scores, running_pool
from gsa_kernels.select.api import select
from gsa_kernels.select.reference import pool_score
from gsa_kernels.selection import SelectionSpec, tile_layout

LENGTH = 100
POOL = 16
granularities = pytest.mark.parametrize(
    "granularity", [(1, 1), (16, 1), (16, 16), (4, 16), (8, 12)], ids=granularity_id
)
documents = pytest.mark.parametrize("documents", [False, True], ids=["one_doc", "docs"])
heads = pytest.mark.parametrize("heads", [1, 2], ids=["shared", "kv"])
poolings = pytest.mark.parametrize("pooling", ["mean", "max"])


def as_kind(factors: IndexFactors, kind: type, **settings) -> IndexFactors:
    held = {f.name: getattr(factors, f.name) for f in fields(IndexFactors)}
    return kind(**held, **settings)


def positions(kind: type, length: int = LENGTH, heads: int = 1, **settings) -> BlockScores:
    return kind(torch.zeros(2, length, 0), length, heads, **settings)


def oracle(length: int = LENGTH, heads: int = 1, seed: int = 0) -> AttentionScores:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, length, 4, 8, generator=g, dtype=torch.float64)
    k = torch.randn(2, length, 2, 8, generator=g, dtype=torch.float64)
    return AttentionScores(torch.zeros(2, length, 0), q, k, heads)


def chosen(factors, spec, budget=45, docs=None, impl="auto"):
    length = factors.k_BSI.shape[1]
    return select(factors, spec, budget, budget, length, docs, impl=impl).selection


@granularities
@heads
@documents
@poolings
def test_pooled_selection_is_the_reference(granularity, heads, documents, pooling):
    docs = make_documents(LENGTH) if documents else None
    factors = make_factors(LENGTH, heads=heads)
    pooled = as_kind(factors, PooledFactors, pool=4 * granularity[0], pooling=pooling)
    spec = SelectionSpec(*granularity, window=7, sinks=3, heads=heads)
    eager, reference = (chosen(pooled, spec, 45, docs, impl) for impl in ("eager", "reference"))
    assert torch.equal(eager.blocks_BHQN, reference.blocks_BHQN)


@granularities
@heads
@documents
@pytest.mark.parametrize("block_score", ["mean", "max"])
def test_hierarchical_selection_is_the_reference(granularity, heads, documents, block_score):
    docs = make_documents(LENGTH) if documents else None
    factors = make_factors(LENGTH, heads=heads, block_score=block_score)
    spec = SelectionSpec(*granularity, window=7, sinks=3, heads=heads)
    settings = {"pool": 2 * granularity[0], "survivors": 2}
    coarse = as_kind(factors, HierarchicalFactors, **settings)
    names = ("count", "mean", "variance", "max", "entropy", "histogram")
    eager, reference = (
        select(coarse, spec, 45, 45, LENGTH, docs, None, names, impl=impl)
        for impl in ("eager", "reference")
    )
    assert torch.equal(eager.selection.blocks_BHQN, reference.selection.blocks_BHQN)
    torch.testing.assert_close(eager.statistics, reference.statistics, rtol=1e-5, atol=1e-6)
    assert eager.statistics["count"].max() <= 4
    assert torch.equal(eager.statistics["histogram"].sum(-1), eager.statistics["count"])


@granularities
@documents
@pytest.mark.parametrize("block_score", ["mean", "max"])
def test_enough_survivors_select_as_the_exact_scores(granularity, documents, block_score):
    docs = make_documents(LENGTH) if documents else None
    factors = make_factors(LENGTH, block_score=block_score)
    spec = SelectionSpec(*granularity, window=7, sinks=3)
    coarse = as_kind(factors, HierarchicalFactors, pool=4 * granularity[0], survivors=100)
    got, exact = (chosen(f, spec, 45, docs).blocks_BHQN for f in (coarse, factors))
    assert torch.equal(got, exact)


@granularities
@documents
@pytest.mark.parametrize("block_score", ["mean", "max"])
def test_bounds_prove_what_they_prune(granularity, documents, block_score):
    docs = make_documents(LENGTH) if documents else None
    factors = make_factors(LENGTH, block_score=block_score)
    spec = SelectionSpec(*granularity, window=7, sinks=3)
    exact = chosen(factors, spec, 45, docs).blocks_BHQN
    shares = []
    for survivors in (2, 5, 100):
        bound = as_kind(
            factors, HierarchicalFactors, pool=2 * granularity[0], survivors=survivors,
            pooling="bound",
        )  # fmt: skip
        args = (bound, spec, 45, 45, LENGTH, docs)
        eager, reference = (select(*args, impl=x, prove=True) for x in ("eager", "reference"))
        assert torch.equal(eager.selection.blocks_BHQN, reference.selection.blocks_BHQN)
        assert torch.equal(eager.proven_BHQ, reference.proven_BHQ)
        proven = eager.proven_BHQ
        assert torch.equal(eager.selection.blocks_BHQN[proven], exact[proven])
        shares.append(float(proven.float().mean()))
    assert shares == sorted(shares) and shares[-1] == 1
    assert shares[0] < 1 or granularity[0] > 8  # few large blocks may all survive
    with pytest.raises(ValueError, match="needs bounds"):
        select(factors, spec, 45, 45, LENGTH, docs, prove=True)


@pytest.mark.parametrize("block_score", ["mean", "max"])
@documents
def test_no_score_exceeds_its_bound(block_score, documents):
    docs = make_documents(LENGTH) if documents else None
    factors = make_factors(LENGTH, block_score=block_score)
    bound = as_kind(factors, HierarchicalFactors, pool=12, survivors=1, pooling="bound")
    layout = tile_layout(SelectionSpec(4, 16, window=7), LENGTH, LENGTH, 0, docs)
    *prepared, running = bound.prepare(4, docs)
    scores = factors.tile_scores(layout, slice(None), 22, prepared)
    bounds = coarse_scores(bound, running, layout, slice(None), 22, 12, "bound")
    allowed = layout.candidates(slice(None), 22)[:, None].expand_as(scores)
    assert (scores <= bounds.repeat_interleave(3, -1)[..., :22] + 1e-12)[allowed].all()
    # One key is its own bound.
    one = as_kind(factors, HierarchicalFactors, pool=1, survivors=1, pooling="bound")
    layout = tile_layout(SelectionSpec(1, 16, window=7), LENGTH, LENGTH)
    *prepared, running = one.prepare(1, None)
    torch.testing.assert_close(
        coarse_scores(one, running, layout, slice(None), 90, 1, "bound")[:, :, -1],
        one.tile_scores(layout, slice(None), 90, prepared)[:, :, -1],
    )


def test_bounds_that_would_not_hold_are_refused():
    factors = make_factors(LENGTH)
    bound = as_kind(factors, HierarchicalFactors, pooling="bound", pool=16)
    for settings in ({"activation": "relu"}, {"scale": -1.0}):
        with pytest.raises(ValueError, match="needs activation 'sigmoid' and a scale"):
            replace(bound, **settings)
    with pytest.raises(ValueError, match="never negative"):
        chosen(replace(bound, weight_BTJ=-bound.weight_BTJ), SelectionSpec(4, 4, window=7))


@documents
@poolings
@pytest.mark.parametrize("pool", [1, 6, 16, 200])
def test_running_pool(documents, pooling, pool):
    docs = make_documents(LENGTH) if documents else None
    k = make_factors(LENGTH).k_BSI
    got = running_pool(k, pool, pooling, docs)
    for b in range(2):
        for s in range(LENGTH):
            first = max(s // pool * pool, 0 if docs is None else int(docs[b, s]))
            keys = k[b, first : s + 1]
            expected = keys.mean(0) if pooling == "mean" else keys.amax(0)
            torch.testing.assert_close(got[b, s], expected)


@granularities
@heads
@documents
@poolings
def test_pooled_scores_at_the_selection(granularity, heads, documents, pooling):
    length = 70
    docs = make_documents(length) if documents else None
    factors = make_factors(length, heads=heads)
    names = ("q_BTJI", "k_BSI", "weight_BTJ", "bias_J")
    learn = {n: getattr(factors, n).clone().requires_grad_() for n in names}
    pooled = as_kind(
        replace(factors, **learn), PooledFactors, pool=POOL * granularity[0] // 4 or 1
    )
    pooled = replace(pooled, pool=4 * granularity[0], pooling=pooling)
    spec = SelectionSpec(*granularity, window=7, sinks=3, heads=heads)
    selection = chosen(pooled, spec, 45, docs)
    got = scores_at(pooled, selection)
    blocks = selection.blocks_BHQN
    expected = torch.full(blocks.shape, -torch.inf, dtype=got.dtype)
    for b, h, i, n in (blocks >= 0).nonzero().tolist():
        key = int(blocks[b, h, i, n]) * granularity[0]
        expected[b, h, i, n] = pool_score(pooled, selection.layout, docs, b, h, i, key)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    full = pooled.tile_scores(
        selection.layout, slice(None), length // granularity[0],
        pooled.prepare(granularity[0], docs),
    )  # fmt: skip
    same = full.gather(-1, blocks.long().clamp_min(0)).masked_fill(blocks < 0, -torch.inf)
    torch.testing.assert_close(got, same)
    kept = blocks >= 0
    for a, b in zip(*(torch.autograd.grad(x[kept].sin().sum(), list(learn.values()))
                      for x in (got, same))):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_pooling_that_does_not_line_up_is_refused():
    factors = as_kind(make_factors(LENGTH), PooledFactors, pool=24)
    with pytest.raises(ValueError, match="pool=24 is not a multiple of the key block of 16"):
        chosen(factors, SelectionSpec(16, 16, window=8))
    for settings in ({"pool": 0}, {"pooling": "median"}):
        with pytest.raises(ValueError, match=str(next(iter(settings.values())))):
            replace(factors, **settings)
    with pytest.raises(ValueError, match="survivors must be at least 1"):
        as_kind(make_factors(LENGTH), HierarchicalFactors, survivors=0)


@pytest.mark.parametrize("granularity", [(1, 1), (16, 1), (16, 16)], ids=granularity_id)
def test_coarse_to_fine_costs_less_than_exact_scores(granularity):
    factors = make_factors(2048, batch=1, block_score="max")
    coarse = as_kind(factors, HierarchicalFactors, pool=64, survivors=4)
    flops = []
    for one in (factors, coarse):
        with FlopCounterMode(display=False) as counter:
            chosen(one, SelectionSpec(*granularity, window=32), 256)
        flops.append(counter.get_total_flops())
    assert flops[1] < 0.3 * flops[0]


PIECES = {
    "pooled": lambda: as_kind(make_factors(LENGTH), PooledFactors, pool=POOL),
    "pooled_max": lambda: as_kind(make_factors(LENGTH), PooledFactors, pool=POOL, pooling="max"),
    "hierarchical": lambda: as_kind(
        make_factors(LENGTH), HierarchicalFactors, pool=POOL, survivors=2
    ),
    "bound": lambda: as_kind(
        make_factors(LENGTH), HierarchicalFactors, pool=POOL, survivors=2, pooling="bound"
    ),
    "random": lambda: positions(RandomScores),
    "strided": lambda: positions(StridedScores, stride=3),
    "oracle": oracle,
}


def cut(factors, low: int, high: int):
    """The factors of queries low .. high - 1 of all, with the keys before high."""
    part = {"k_BSI": factors.k_BSI[:, :high], "q_start": low}
    for name in ("q_BTJI", "weight_BTJ", "q_BTHE"):
        if hasattr(factors, name):
            part[name] = getattr(factors, name)[:, low:high]
    if hasattr(factors, "k_BSKE"):
        part["k_BSKE"] = factors.k_BSKE[:, :high]
    if hasattr(factors, "queries"):
        part["queries"] = high - low
    return replace(factors, **part)


@pytest.mark.parametrize("kind", PIECES)
@pytest.mark.parametrize("granularity", [(1, 1), (4, 16), (16, 16)], ids=granularity_id)
@documents
def test_in_pieces(kind, granularity, documents):
    docs = make_documents(LENGTH) if documents else None
    factors = PIECES[kind]()
    spec = SelectionSpec(*granularity, window=7, sinks=3)
    whole = chosen(factors, spec, 45, docs)
    tail, cuts = None, [1, 2, 17, 48, 50, 99]
    for low, high in zip([0, *cuts], [*cuts, LENGTH]):
        held = None if docs is None else docs[:, :high]
        part = select(cut(factors, low, high), spec, 45, 45, high - low, held, tail).selection
        expected = whole.to_dense_mask().expand(2, -1, -1, -1)[:, :, low:high, :high]
        assert torch.equal(part.to_dense_mask(), expected)
        tail = part.tail()


@dataclass
class Memory:
    """What a decoding host keeps."""

    index_pooled_BMI: torch.Tensor | None = None

    def extend(self, name, new):
        old = getattr(self, name)
        setattr(self, name, new if old is None else torch.cat([old, new], 1))
        return getattr(self, name)


@pytest.mark.parametrize("kind", ["pooled", "pooled_max", "hierarchical", "bound"])
@pytest.mark.parametrize("granularity", [(1, 1), (4, 16)], ids=granularity_id)
@documents
def test_remembered_pooled_keys_change_no_bit(kind, granularity, documents):
    docs = make_documents(LENGTH) if documents else None
    factors = PIECES[kind]()
    spec = SelectionSpec(*granularity, window=7, sinks=3)
    memory, step = Memory(), granularity[1]
    cuts = [0, 16, 48, *range(64, LENGTH, step), LENGTH]
    for low, high in itertools.pairwise(cuts):
        held = None if docs is None else docs[:, :high]
        part = cut(factors, low, high)
        layout = tile_layout(spec, high - low, high, low, held)
        blocks = (high - 7) // granularity[0]
        args = (layout, slice(None), blocks)
        expected = coarse_or_all(part, *args, part.prepare(granularity[0], held))
        part = part.remember(memory)
        got = coarse_or_all(part, *args, part.prepare(granularity[0], held))
        assert torch.equal(got, expected)
        assert memory.index_pooled_BMI is None or memory.index_pooled_BMI.shape[1] == high // POOL
    assert memory.index_pooled_BMI.shape[1] > 3


def coarse_or_all(factors, layout, tiles, blocks, prepared):
    """The scores of pooling blocks that a choice begins with."""
    if isinstance(factors, PooledFactors):
        return factors.tile_scores(layout, tiles, blocks, prepared)
    return coarse_scores(
        factors, prepared[2], layout, tiles, blocks, factors.pool, factors.pooling
    )


def murmur(x: int) -> int:
    x &= 2**32 - 1
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def test_random_scores_are_the_hash():
    layout = tile_layout(SelectionSpec(4, 16, window=7), LENGTH, LENGTH)
    factors = positions(RandomScores, heads=2, seed=-3, stream=5)
    got = factors.tile_scores(layout, slice(2, 4), 6, None)
    assert got.shape == (2, 2, 2, 6) and torch.equal(got[0], got[1])
    for h in range(2):
        for i, tile in enumerate((2, 3)):
            for j in range(6):
                key = murmur(murmur(murmur(h - 3) + 5) + 16 * tile)
                assert float(got[0, h, i, j]) == (murmur(key + 4 * j) >> 8) / 2**24


def test_random_scores_are_uniform_and_unrelated():
    layout = tile_layout(SelectionSpec(1, 1, window=1), 1000, 1000)
    kinds = [positions(RandomScores, 1000, seed=s, stream=n) for s, n in ((0, 0), (0, 1), (1, 0))]
    draws = [x.tile_scores(layout, slice(500, 1000), 500, None) for x in kinds]
    for x in draws:
        assert abs(float(x.mean()) - 0.5) < 5e-3 and abs(float(x.var()) - 1 / 12) < 2e-3
    rows = torch.stack([d[0, 0].flatten() for d in draws] + [draws[0][0, 0].roll(1, 0).flatten()])
    assert (torch.corrcoef(rows) - torch.eye(4)).abs().max() < 0.01


@pytest.mark.parametrize("kind", [RandomScores, StridedScores])
def test_positions_count_from_the_document(kind):
    spec = SelectionSpec(4, 4, window=4)
    docs = torch.zeros(2, LENGTH, dtype=torch.long)
    docs[:, 48:] = 48
    inside = chosen(positions(kind), spec, 20, docs).blocks_BHQN[:, :, 12:]
    alone = chosen(positions(kind, LENGTH - 48), spec, 20).blocks_BHQN
    width = alone.shape[-1]
    assert torch.equal(inside[..., :width], torch.where(alone >= 0, alone + 12, -1))


@pytest.mark.parametrize("stride", [0, 3])
def test_strided_blocks_are_spread_evenly(stride):
    spec = SelectionSpec(1, 1, window=1)
    row = chosen(positions(StridedScores, 1025, stride=stride), spec, 65).blocks_BHQN[0, 0, -1]
    gaps = row.diff()
    if stride == 0:
        assert (gaps == 16).all()
    else:
        assert (row % 3 == 0).all() and gaps.max() <= 24
    with pytest.raises(ValueError, match="stride"):
        positions(StridedScores, stride=-1)


@heads
@documents
def test_the_oracle_is_the_attention_of_the_anchor(heads, documents):
    docs = make_documents(LENGTH) if documents else None
    factors = oracle(heads=heads)
    spec = SelectionSpec(4, 16, window=7, heads=heads)
    layout = tile_layout(spec, LENGTH, LENGTH, 0, docs)
    got = factors.tile_scores(layout, slice(1, 6), 20, factors.prepare(4, docs))
    k = factors.k_BSKE.repeat_interleave(2, 2)
    logits = torch.einsum("bthe,bshe->bhts", factors.q_BTHE, k) * 8**-0.5
    position = torch.arange(LENGTH)
    mask = position <= position[:, None]
    if docs is not None:
        mask = mask & (position >= docs[..., None])[:, None]
    p = logits.masked_fill(~mask, -torch.inf).softmax(-1)[:, :, 16:81:16]
    p = p.unflatten(1, (heads, -1)).mean(2)[..., :80].unflatten(-1, (20, 4)).sum(-1)
    torch.testing.assert_close(got, p)


@pytest.mark.parametrize("granularity", [(1, 1), (16, 1)], ids=granularity_id)
def test_the_oracle_covers_the_most_where_each_query_chooses(granularity):
    factors = oracle()
    spec = SelectionSpec(*granularity, window=7, sinks=3)
    selection = chosen(factors, spec, 45)
    seen = probe(factors.q_BTHE, factors.k_BSKE, selection.layout, [60, 80, 99], selection)
    assert len(seen.got) and torch.allclose(seen.got, seen.best, atol=1e-3)
    other = chosen(positions(RandomScores), spec, 45)
    worse = probe(factors.q_BTHE, factors.k_BSKE, other.layout, [60, 80, 99], other)
    assert worse.got.sum() < 0.9 * seen.got.sum()


def test_scores_of_a_class_with_no_gather_of_its_own():
    selection = make_selection(LENGTH, (4, 16))
    factors = positions(RandomScores)
    got = scores_at(factors, selection)
    matrix = factors.tile_scores(selection.layout, slice(None), LENGTH // 4, None)
    blocks = selection.blocks_BHQN
    expected = matrix.gather(-1, blocks.long().clamp_min(0)).masked_fill(blocks < 0, -torch.inf)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_low_precision_factors_are_scored_in_float32(autocast):
    factors = make_factors(300)
    names = ("q_BTJI", "k_BSI", "weight_BTJ")
    low = replace(factors, **{n: getattr(factors, n).bfloat16() for n in names})
    wide = replace(low, **{n: getattr(low, n).double() for n in names})
    keys = low.k_BSI[:, None, None].expand(-1, 1, 300, -1, -1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, one_by_one = low.tile(low.k_BSI), low.gathered(keys)
    expected = wide.tile(wide.k_BSI)
    for scores in (got, one_by_one):
        torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["n_queries", "with_keys", "tile_scores"])
def test_what_a_score_function_leaves_out_is_named(name):
    class Acme(BlockScores):
        pass

    arguments = {"n_queries": None, "with_keys": (None,), "tile_scores": (None,) * 4}[name]
    with pytest.raises(NotImplementedError, match=f"Acme does not define {name}"):
        getattr(Acme(), name)(*(arguments or ()))
