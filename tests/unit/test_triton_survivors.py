"""Coarse-to-fine selection by the Triton kernels against the eager path and the reference.

On a machine without a GPU they run in Triton's interpreter, slowly: shapes are tiny.
"""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from kernel_cases import captured_in_a_graph, granularity_id, make_factors
from test_triton_select import (
    DEVICE,
    DTYPES,
    assert_same_choice,
    docs_of,
    documents,
    exact,
    low,
    whole_numbers,
)

from gsa_kernels.bench.verify import recall
from gsa_kernels.index_score.api import HierarchicalFactors, IndexFactors
from gsa_kernels.index_score.pooled import running_pool
from gsa_kernels.select.api import STATISTICS, select
from gsa_kernels.selection import SelectionSpec
from gsa_platform.model.attention_layer import LayerCache

pytest.importorskip("triton")
pytestmark = pytest.mark.kernel


def coarse(factors, **settings):
    held = {f.name: getattr(factors, f.name) for f in fields(IndexFactors)}
    return HierarchicalFactors(**held, **settings)


def numbers(length, **kwargs):
    """whole_numbers in pairs of equal keys, whose means are exact in every precision."""
    factors = whole_numbers(length, **kwargs)
    k = factors.k_BSI.repeat_interleave(2, 1)[:, :length]
    return low(replace(factors, k_BSI=k * 4))


CASES = [  # C, R, T, index heads, selection heads, pool, survivors, block score, pooling
    (1, 1, 1, 4, 1, 4, 2, "mean", "mean"),
    (1, 1, 63, 4, 1, 8, 2, "mean", "max"),
    (1, 1, 40, 4, 2, 4, 5, "mean", "mean"),
    (4, 1, 60, 2, 1, 8, 3, "mean", "mean"),
    (8, 16, 100, 3, 1, 16, 2, "max", "mean"),
    (5, 7, 100, 1, 1, 15, 2, "max", "max"),
    (16, 16, 130, 4, 4, 16, 9, "mean", "mean"),
]


def case_of(case):
    c, r, length, index_heads, heads, pool, survivors, block_score, pooling = case
    factors = numbers(length, index_heads=index_heads, heads=heads, block_score=block_score)
    sinks, k = (0, 20) if c == 5 else (3, 45)
    spec = SelectionSpec(c, r, window=7, sinks=sinks, heads=heads)
    settings = {"pool": pool, "survivors": survivors, "pooling": pooling}
    return coarse(factors, **settings), spec, k, length


@pytest.mark.parametrize("case", CASES, ids=str)
@documents
def test_the_choice_is_that_of_the_definition(case, documents):
    factors, spec, k, length = case_of(case)
    docs = docs_of(length, documents)
    got, eager, reference = (
        select(factors, spec, k, k, length, docs, statistics=STATISTICS, impl=impl)
        for impl in ("triton", "eager", "reference")
    )
    assert torch.equal(eager.selection.blocks_BHQN, reference.selection.blocks_BHQN)
    assert torch.equal(got.selection.blocks_BHQN, eager.selection.blocks_BHQN)
    torch.testing.assert_close(got.statistics, eager.statistics, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_enough_survivors_choose_as_the_exact_scores_do(dtype):
    """Every block is scored once, as well as by the kernel that scores them all."""
    factors = low(make_factors(50), dtype)
    spec, docs = SelectionSpec(2, 1, window=7, sinks=3), docs_of(50, True)
    got = select(coarse(factors, pool=8, survivors=100), spec, 30, 30, 50, docs, impl="triton")
    expected = select(exact(factors), spec, 30, 30, 50, docs, impl="eager").selection
    assert_same_choice(got.selection, expected, factors, docs)


@documents
@pytest.mark.parametrize("granularity", [(1, 1), (4, 16)], ids=granularity_id)
def test_bounds_and_what_they_prove(granularity, documents):
    factors, docs = low(make_factors(45, heads=2)), docs_of(45, documents)
    spec = SelectionSpec(*granularity, window=7, sinks=3, heads=2)
    bound = coarse(factors, pool=4 * granularity[0], survivors=3, pooling="bound")
    got, eager = (
        select(bound, spec, 18, 18, 45, docs, impl=impl, prove=True)
        for impl in ("triton", "eager")
    )
    assert torch.equal(got.selection.blocks_BHQN, eager.selection.blocks_BHQN)
    assert torch.equal(got.proven_BHQ, eager.proven_BHQ)
    wide = low(make_factors(45, width=65))
    with pytest.raises(ValueError, match="bounds of up to 64"):
        select(coarse(wide, pool=4, pooling="bound"), spec, 18, 18, 45, impl="triton")


@documents
@pytest.mark.parametrize("block_score", ["mean", "max"])
@pytest.mark.parametrize("granularity", [(1, 1), (4, 1)], ids=granularity_id)
@pytest.mark.parametrize("kind", ["exact", "coarse"])
def test_keys_of_a_longer_cache_are_read_where_they_are(
    kind, granularity, block_score, documents, monkeypatch
):
    from gsa_kernels.index_score import survivor_launch, triton_launch

    factors = low(make_factors(60, block_score=block_score, index_heads=2))
    if kind == "coarse":
        factors = coarse(factors, pool=8, survivors=3, pooling="bound")
    row = torch.arange(59, 60, device=DEVICE)
    factors = replace(factors.rows(row), q_start=59)
    cache = torch.full((2, 90, 8), torch.nan, device=DEVICE)
    cache[:, :60] = factors.k_BSI
    seen = []

    def watch(module, name):
        kernel = getattr(module, name)

        class Watched:
            arg_names = kernel.arg_names

            def __getitem__(self, grid):
                def launch(*args, **constants):
                    seen.append((name, [x.data_ptr() for x in args[:2] if torch.is_tensor(x)]))
                    return kernel[grid](*args, **constants)

                return launch

        monkeypatch.setattr(module, name, Watched())

    spec, docs = SelectionSpec(*granularity, window=7, sinks=3), docs_of(60, documents)
    expected = select(factors, spec, 22, 22, 1, docs, impl="triton").selection.blocks_BHQN
    watch(triton_launch, "score_kernel")
    watch(triton_launch, "pool_kernel")
    watch(survivor_launch, "running_kernel")
    watch(survivor_launch, "survivor_kernel")
    view = replace(factors, k_BSI=cache[:, :60])
    got = select(view, spec, 22, 22, 1, docs, impl="triton").selection.blocks_BHQN
    assert torch.equal(got, expected) and (got >= 0).any()
    pooled = granularity[0] > 1 and block_score == "mean"
    readers = {"pool_kernel" if pooled else "score_kernel"}
    if kind == "coarse":
        readers = {"running_kernel", "pool_kernel" if pooled else "survivor_kernel"}
    assert {name for name, held in seen if cache.data_ptr() in held} == readers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pooling", ["mean", "max", "bound"])
@documents
def test_keys_pooled_up_to_each_position(dtype, pooling, documents):
    from gsa_kernels.index_score import survivor_ops

    k = torch.randn(2, 50, 12, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    docs = docs_of(50, documents)
    got = survivor_ops.running_pool(k, docs, 12, pooling)
    expected = running_pool(k.double(), 12, pooling, docs)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    # What comes later changes no bit.
    first = survivor_ops.running_pool(k[:, :31].contiguous(), docs, 12, pooling)
    assert torch.equal(first, got[:, :31])


@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[4]], ids=str)
@pytest.mark.parametrize("remembers", [False, True])
def test_in_pieces(case, remembers):
    factors, spec, k, length = case_of(case)
    docs = docs_of(length, True)
    whole = select(factors, spec, k, k, length, docs, impl="triton").selection
    cut, tail, memory = length - 19, None, LayerCache()
    for start, stop in ((0, cut), (cut, cut + 1), (cut + 1, length)):
        piece = replace(
            factors,
            q_BTJI=factors.q_BTJI[:, start:stop],
            weight_BTJ=factors.weight_BTJ[:, start:stop],
            k_BSI=factors.k_BSI[:, :stop],
            q_start=start,
        )
        if remembers:
            piece = piece.remember(memory)
        part = select(piece, spec, k, k, stop - start, docs, tail, impl="triton").selection
        expected = whole.to_dense_mask()[:, :, start:stop, :stop]
        assert torch.equal(part.to_dense_mask(), expected)
        tail = part.tail()
    if remembers:
        assert memory.index_pooled_BMI.shape[1] == length // factors.pool


def test_equal_scores_choose_the_first():
    factors, spec, k, length = case_of(CASES[3])
    equal = replace(factors, q_BTJI=factors.q_BTJI * 0)
    got, expected = (
        select(equal, spec, k, k, length, docs_of(length, True), impl=impl).selection.blocks_BHQN
        for impl in ("triton", "eager")
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("part", ["split", "whole lists", "chunks of rows"])
def test_lists_in_parts_and_memory_that_was_not_set(part, monkeypatch):
    from gsa_kernels.index_score import survivor_launch
    from gsa_kernels.select import kernels

    factors, spec, k, length = case_of(CASES[3])
    docs = docs_of(length, True)
    clean = select(factors, spec, k, k, length, docs, None, STATISTICS, impl="triton")
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan if made.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)
    if part != "split":
        monkeypatch.setattr(survivor_launch, "PROGRAMS", 1)
    if part == "chunks of rows":
        monkeypatch.setattr(kernels, "SCORES_HELD", 2000)
    dirty = select(factors, spec, k, k, length, docs, None, STATISTICS, impl="triton")
    assert torch.equal(dirty.selection.blocks_BHQN, clean.selection.blocks_BHQN)
    torch.testing.assert_close(dirty.statistics, clean.statistics, rtol=0, atol=0)


def test_long_lists_are_shortened_first(monkeypatch):
    from gsa_kernels.select import kernels, triton_launch

    factors, spec, k, length = case_of(CASES[3])
    factors = replace(factors.rows(torch.tensor([length - 1], device=DEVICE)), q_start=length - 1)
    expected = select(factors, spec, k, k, 1, impl="triton").selection
    for module in (kernels, triton_launch):
        monkeypatch.setattr(module, "LONGEST", 5)
    got = select(factors, spec, k, k, 1, impl="triton").selection
    assert torch.equal(got.blocks_BHQN, expected.blocks_BHQN)


@pytest.mark.skipif(DEVICE == "cuda", reason="an assertion on a GPU ends the process")
def test_nan_is_refused():
    factors, spec, k, length = case_of(CASES[3])
    bad = factors.k_BSI.clone()
    bad[1, 20] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        select(replace(factors, k_BSI=bad), spec, k, k, length, impl="triton")


def test_operators_are_registered_truthfully():
    from gsa_kernels.index_score import ops, survivor_ops
    from gsa_kernels.select import ops as select_ops

    factors, docs = low(make_factors(50), torch.float16), docs_of(50, True)
    checks = ("test_schema", "test_faketensor")
    opcheck = torch.library.opcheck
    k = factors.k_BSI
    opcheck(survivor_ops.running_pool_operator, (k, docs, 16, "mean"), test_utils=checks)
    running = survivor_ops.running_pool(k, docs, 16, "mean")
    args = (factors.q_BTJI, running[:, 15::16, None].contiguous(), factors.weight_BTJ)
    args = (*args, factors.bias_J, docs, [8, 16, 7, 3, 0], [1, 4, 3], 0.3, True, 2, False)
    args = (*args, running, 2)
    opcheck(ops.block_scores_operator, args, test_utils=checks)
    scores = ops.block_scores(*args)
    args = (scores, 3, None, 2, 2, docs, [8, 16, 7, 3], 1, None, 2)
    opcheck(select_ops.top_blocks_operator, args, test_utils=checks)
    lists = select_ops.top_blocks(*args)
    keys = ops.pool_keys(k, docs, 8, 3)
    args = (factors.q_BTJI, keys, factors.weight_BTJ, factors.bias_J, docs, lists)
    args = (*args, [8, 16, 7, 3, 0, 2], 1, 0.3, True, False)
    opcheck(survivor_ops.survivor_scores_operator, args, test_utils=checks)
    scores = survivor_ops.survivor_scores(*args)
    args = (scores, 4, None, 3, 3, None, [], 0, lists, 2)
    opcheck(select_ops.top_blocks_operator, args, test_utils=checks)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("granularity", [(64, 64), (64, 1), (1, 1), (1, 16)], ids=granularity_id)
@pytest.mark.parametrize("pooling", ["mean", "bound"])
def test_captured_in_a_cuda_graph(granularity, pooling):
    factors = low(make_factors(6000, width=64), torch.bfloat16)
    factors = coarse(factors, pool=128, survivors=12, pooling=pooling)
    spec = SelectionSpec(*granularity, window=128, sinks=64)

    def step():
        return select(factors, spec, 1024, 1024, 6000, impl="triton").selection.blocks_BHQN

    graph, captured = captured_in_a_graph(step)
    factors.q_BTJI.normal_()
    graph.replay()
    assert torch.equal(captured, step())
    expected = select(factors, spec, 1024, 1024, 6000, impl="eager").selection
    # Sums in another order move a few scores, and pooled keys, over a step of what is compared.
    assert recall(captured, expected.blocks_BHQN) > 0.99


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("granularity", [(64, 64), (1, 1)], ids=granularity_id)
def test_one_new_query_of_a_long_cache(granularity):
    factors = low(make_factors(70_000, batch=2, width=64), torch.bfloat16)
    factors = coarse(factors, pool=256, survivors=32)
    spec = SelectionSpec(*granularity, window=128, sinks=64)
    last = replace(factors.rows(torch.tensor([69_952], device=DEVICE)), q_start=69_952)
    last = replace(last, k_BSI=factors.k_BSI[:, :69_953])
    got, expected = (
        select(last, spec, 2048, 2048, 1, impl=impl).selection.blocks_BHQN
        for impl in ("triton", "eager")
    )
    assert recall(got, expected) > 0.99


def test_one_compiled_graph():
    factors, spec, k, length = case_of(CASES[4])

    def choose(q):
        chosen = select(replace(factors, q_BTJI=q), spec, k, k, length, impl="triton")
        return chosen.selection.blocks_BHQN + 1

    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(factors.q_BTJI), choose(factors.q_BTJI))
