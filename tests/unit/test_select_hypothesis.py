"""Selection over drawn scores: the chunked implementation is the definition."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import make_factors
from selection_strategies import documents, few, lengths, specs

from gsa_kernels.index_score.api import HierarchicalFactors, IndexFactors, PooledFactors
from gsa_kernels.select.api import select
from gsa_kernels.select.statistics import STATISTICS
from gsa_kernels.topk import comparable, top_blocks


@st.composite
def factors(draw, spec, batch, length):
    """Scores of any form; with all of them equal, half of them equal, or none."""
    made = make_factors(
        length,
        batch=batch,
        index_heads=2 * spec.heads,
        width=4,
        heads=spec.heads,
        activation=draw(st.sampled_from(("sigmoid", "relu"))),
        block_score=draw(st.sampled_from(("mean", "max"))),
        seed=draw(st.integers(0, 1 << 30)),
    )
    ties = draw(st.sampled_from(("none", "none", "half", "all")))
    if ties == "all":
        made = replace(made, q_BTJI=made.q_BTJI * 0)
    elif ties == "half":
        made = replace(made, k_BSI=made.k_BSI.sign())
    form = draw(st.sampled_from((IndexFactors, IndexFactors, PooledFactors, HierarchicalFactors)))
    if form is IndexFactors:
        return made
    given_fields = {f.name: getattr(made, f.name) for f in fields(IndexFactors)}
    pool = {"pool": spec.key_block * draw(st.sampled_from((1, 2, 4)))}
    if form is HierarchicalFactors:
        pool["survivors"] = draw(st.sampled_from((1, 3)))
    return form(**given_fields, **pool)


@st.composite
def cases(draw):
    spec = draw(specs((1, 3, 8, 16), (1, 7, 16)))
    length, batch = draw(lengths(90)), draw(st.sampled_from((1, 2)))
    scored = draw(factors(spec, batch, length))
    docs = draw(documents(batch, length))
    budget, cut = draw(st.sampled_from((1, 30, 45, 60, 90))), draw(st.integers(0, length))
    return scored, spec, budget, length, docs, cut


@few(40)
@given(cases())
def test_eager_is_the_definition(case):
    scored, spec, budget, length, docs, _ = case
    args = (scored, spec, budget, budget, length, docs)
    got = select(*args, statistics=STATISTICS)
    wanted = select(*args, statistics=STATISTICS, impl="reference")
    assert torch.equal(got.selection.blocks_BHQN, wanted.selection.blocks_BHQN)
    for name, value in wanted.statistics.items():
        torch.testing.assert_close(got.statistics[name], value, rtol=1e-5, atol=1e-6)


@few(40)
@given(cases())
def test_going_on_from_a_cache_changes_nothing(case):
    scored, spec, budget, length, docs, cut = case
    whole = select(scored, spec, budget, budget, length, docs).selection
    if not 0 < cut < length:
        return
    before = replace(
        scored.rows(torch.arange(cut)), k_BSI=scored.k_BSI[:, :cut]
    )  # as if the rest were not there yet
    known = None if docs is None else docs[:, :cut]
    first = select(before, spec, budget, budget, cut, known).selection
    after = replace(scored.rows(torch.arange(cut, length)), q_start=cut)
    second = select(after, spec, budget, budget, length - cut, docs, first.tail()).selection
    mask = whole.to_dense_mask()
    assert torch.equal(first.to_dense_mask(), mask[:, :, :cut, :cut])
    assert torch.equal(second.to_dense_mask(), mask[:, :, cut:])


@few(60)
@given(st.data())
def test_top_blocks_are_the_best_and_the_first_of_equals(data):
    rows, columns = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    values = st.sampled_from((float("-inf"), 0.0, 0.25, 0.5, 0.5 + 2**-20, 1.0))
    row = st.lists(values, min_size=columns, max_size=columns)
    table = data.draw(st.lists(row, min_size=rows, max_size=rows))
    scores = comparable(torch.tensor(table))
    width = data.draw(st.integers(1, columns))
    wanted = torch.tensor([data.draw(st.integers(0, width)) for _ in range(rows)])
    got = top_blocks(scores, wanted, width)
    for row, n, found in zip(scores.tolist(), wanted.tolist(), got.tolist(), strict=True):
        order = sorted(
            (c for c in range(columns) if row[c] > float("-inf")), key=lambda c: -row[c]
        )
        expected = sorted(order[:n])
        assert found == expected + [-1] * (width - len(expected))
