"""Exact top-k selection: the chunked implementation against the one in plain Python."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    GRANULARITIES,
    LENGTHS,
    granularity_id,
    make_documents,
    make_factors,
)

from gsa_kernels.index_score import api as index_score
from gsa_kernels.index_score.reference import block_score_matrix
from gsa_kernels.select.api import select
from gsa_kernels.selection import SelectionSpec

granularities = pytest.mark.parametrize("granularity", GRANULARITIES, ids=granularity_id)
lengths = pytest.mark.parametrize("length", LENGTHS)
documents = pytest.mark.parametrize("documents", [False, True], ids=["one_doc", "docs"])


def by_variance(statistics):
    return 20 + (statistics["variance"] * 1000).long() % 30


BUDGETS = {"fixed": 45, "rule": by_variance, "everything": 10_000}


def both(factors, spec, budget, max_keys, docs=None, statistics=("variance",)):
    length = factors.k_BSI.shape[1]
    kwargs = {"statistics": statistics}
    return [
        select(factors, spec, budget, max_keys, length, docs, impl=impl, **kwargs)
        for impl in ("eager", "reference")
    ]


@granularities
@lengths
@documents
@pytest.mark.parametrize("heads", [1, 2], ids=["shared", "kv"])
@pytest.mark.parametrize("block_score", ["mean", "max"])
def test_eager_is_the_reference(granularity, length, documents, heads, block_score):
    factors = make_factors(length, heads=heads, block_score=block_score)
    spec = SelectionSpec(*granularity, window=7, sinks=3, heads=heads)
    docs = make_documents(length) if documents else None
    for budget in (45, by_variance):
        eager, reference = both(factors, spec, budget, 50, docs)
        assert torch.equal(eager.selection.blocks_BHQN, reference.selection.blocks_BHQN)


@granularities
@pytest.mark.parametrize("activation", index_score.ACTIVATIONS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_one_tile_at_a_time_is_the_same(granularity, activation, budget, monkeypatch):
    factors = make_factors(100, activation=activation)
    spec = SelectionSpec(*granularity, window=5)
    rule = BUDGETS[budget]
    keys = rule if isinstance(rule, int) else 50
    whole = select(factors, spec, rule, keys, 100, statistics=("variance",)).selection
    whole = whole.blocks_BHQN
    monkeypatch.setitem(index_score._CHUNK, "cpu", 1)
    eager, reference = both(factors, spec, rule, keys)
    assert torch.equal(eager.selection.blocks_BHQN, whole)
    assert torch.equal(reference.selection.blocks_BHQN, whole)


@granularities
@documents
def test_lists_are_ascending_candidates(granularity, documents):
    docs = make_documents(130) if documents else None
    spec = SelectionSpec(*granularity, window=7, sinks=3)
    chosen = select(make_factors(130), spec, 45, 45, 130, docs).selection
    candidates = chosen.layout.candidates(slice(None), chosen.layout.n_blocks)
    candidates = candidates.expand(2, -1, -1)
    for b in range(2):
        for i in range(chosen.layout.n_tiles):
            row = chosen.blocks_BHQN[b, 0, i].tolist()
            kept = [j for j in row if j >= 0]
            assert row == sorted(kept) + [-1] * (len(row) - len(kept))
            assert all(candidates[b, i, j] for j in kept)
            assert len(kept) == min(len(row), int(candidates[b, i].sum()))


@granularities
def test_equal_scores_take_the_lowest_positions(granularity):
    factors = replace(make_factors(130), q_BTJI=torch.zeros(2, 130, 4, 8, dtype=torch.float64))
    spec = SelectionSpec(*granularity, window=7, sinks=3)
    eager, reference = both(factors, spec, 45, 45)
    assert torch.equal(eager.selection.blocks_BHQN, reference.selection.blocks_BHQN)
    first = -(-3 // granularity[0])
    for row in eager.selection.blocks_BHQN.flatten(0, 2).tolist():
        kept = [j for j in row if j >= 0]
        assert kept == list(range(first, first + len(kept)))


def test_heads_choose_from_their_own_index_heads():
    factors = make_factors(100, heads=2)
    spec = SelectionSpec(4, 1, window=4, heads=2)
    chosen = select(factors, spec, 24, 24, 100).selection.blocks_BHQN
    assert not torch.equal(chosen[:, 0], chosen[:, 1])
    for h in range(2):
        part = slice(2 * h, 2 * h + 2)
        alone = replace(
            factors,
            q_BTJI=factors.q_BTJI[:, :, part],
            weight_BTJ=factors.weight_BTJ[..., part],
            bias_J=factors.bias_J[part],
            heads=1,
        )
        one = select(alone, replace(spec, heads=1), 24, 24, 100).selection.blocks_BHQN
        assert torch.equal(chosen[:, h : h + 1], one)


@pytest.mark.parametrize("part", ["q_BTJI", "k_BSI", "weight_BTJ"])
@pytest.mark.parametrize("granularity", [(1, 1), (16, 1), (16, 16)], ids=granularity_id)
def test_nan_scores_are_refused(granularity, part):
    factors = make_factors(100)
    bad = getattr(factors, part).clone()
    # Two positions: one that every later query reads, one that is a tile's anchor.
    bad[1, [20, 96]] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        select(replace(factors, **{part: bad}), SelectionSpec(*granularity, window=8), 40, 40, 100)


@granularities
@documents
def test_statistics(granularity, documents):
    factors = make_factors(100, heads=2)
    spec = SelectionSpec(*granularity, window=7, sinks=3, heads=2)
    docs = make_documents(100) if documents else None
    names = ("count", "mean", "variance", "max", "entropy")
    eager, reference = both(factors, spec, 45, 45, docs, statistics=names)
    assert tuple(eager.statistics) == names
    torch.testing.assert_close(eager.statistics, reference.statistics, rtol=1e-5, atol=1e-6)
    layout = eager.selection.layout
    scores = block_score_matrix(factors, spec.key_block, docs)
    anchors = scores[:, :, layout.anchor_Q]
    allowed = layout.candidates(slice(None), scores.shape[-1])[:, None].expand_as(anchors)
    count = allowed.sum(-1)
    mean = (anchors * allowed).sum(-1) / count.clamp_min(1)
    torch.testing.assert_close(eager.statistics["count"], count.float())
    torch.testing.assert_close(eager.statistics["mean"], mean.float())
    assert not select(factors, spec, 45, 45, 100, docs).statistics


def test_a_rule_sets_the_budget_of_each_tile():
    seen = []

    def rule(statistics):
        seen.append(statistics["count"])
        return torch.where(statistics["count"] > 40, 30, 14)

    spec = SelectionSpec(4, 1, window=4, sinks=3)
    chosen = select(make_factors(300), spec, rule, 50, 300)
    count = chosen.statistics["count"]
    wanted = torch.where(count > 40, (30 - 8) // 4, (14 - 8) // 4)
    assert torch.equal(chosen.selection.counts_BHQ, torch.minimum(wanted, count.long()))
    assert torch.equal(torch.cat(seen, -1), count)


@pytest.mark.parametrize("rule_keys", [0, 7, 10_000])
def test_a_rule_is_held_to_the_window_and_max_keys(rule_keys):
    spec = SelectionSpec(4, 4, window=4)
    rule = select(
        make_factors(100), spec, lambda s: torch.full_like(s["count"], rule_keys).long(), 20, 100
    )
    fixed = select(make_factors(100), spec, min(rule_keys, 20), 20, 100)
    assert torch.equal(rule.selection.blocks_BHQN, fixed.selection.blocks_BHQN)
    assert rule.selection.blocks_BHQN.shape[-1] == 4


@granularities
@pytest.mark.parametrize("cuts", [[50], [1, 2, 3], [16, 17, 48, 99]], ids=str)
@documents
@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_in_pieces(granularity, cuts, documents, impl):
    docs = make_documents(100) if documents else None
    factors = make_factors(100)
    spec = SelectionSpec(*granularity, window=7, sinks=3)
    whole = select(factors, spec, 45, 45, 100, docs).selection
    tail = None
    for low, high in zip([0, *cuts], [*cuts, 100]):
        piece = replace(
            factors,
            q_BTJI=factors.q_BTJI[:, low:high],
            weight_BTJ=factors.weight_BTJ[:, low:high],
            k_BSI=factors.k_BSI[:, :high],
            q_start=low,
        )
        held = None if docs is None else docs[:, :high]
        part = select(piece, spec, 45, 45, high - low, held, tail, impl=impl).selection
        expected = whole.to_dense_mask()[:, :, low:high, :high]
        assert torch.equal(part.to_dense_mask(), expected)
        tail = part.tail()


def test_errors():
    factors = make_factors(20)
    spec = SelectionSpec(4, 8)
    with pytest.raises(ValueError, match="'nonsense' is not one of auto"):
        select(factors, spec, 16, 16, 20, impl="nonsense")
    with pytest.raises(ValueError, match="hold 20 queries, not 24"):
        select(factors, spec, 16, 16, 24)
    inside = replace(factors.rows(torch.arange(12, 20)), q_start=12)
    with pytest.raises(ValueError, match="unfinished tile"):
        select(inside, spec, 16, 16, 8)
    wrong = select(make_factors(11), spec, 16, 16, 11).selection.tail()
    with pytest.raises(ValueError, match="unfinished tile"):
        select(inside, spec, 16, 16, 8, previous=wrong)
    for change in ({"activation": "gelu"}, {"block_score": "sum"}, {"heads": 3}):
        with pytest.raises(ValueError, match=str(next(iter(change.values())))):
            replace(factors, **change)
