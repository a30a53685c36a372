"""The Triton kernels of scoring and selection against the eager path and the reference.

On a machine without a GPU they run in Triton's interpreter, slowly: shapes are tiny.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import captured_in_a_graph, granularity_id, make_documents, make_factors

from gsa_kernels.index_score.api import PooledFactors, RandomScores
from gsa_kernels.index_score.keys import pool_keys
from gsa_kernels.index_score.reference import block_score_matrix
from gsa_kernels.select.api import STATISTICS, select
from gsa_kernels.selection import SelectionSpec
from gsa_kernels.topk import comparable, top_blocks

pytest.importorskip("triton")

pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies bfloat16 matrices as if they were integers.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
TENSORS = ("q_BTJI", "k_BSI", "weight_BTJ", "bias_J")
documents = pytest.mark.parametrize("documents", [False, True], ids=["one_doc", "docs"])


def low(factors, dtype=torch.float32):
    parts = {n: getattr(factors, n).to(DEVICE, dtype) for n in TENSORS}
    return replace(factors, **parts)


def exact(factors):
    return replace(factors, **{n: getattr(factors, n).double() for n in TENSORS})


def docs_of(length, documents):
    return make_documents(length).to(DEVICE) if documents else None


def whole_numbers(length, **kwargs):
    """Factors whose scores every precision computes exactly; many tie."""
    factors = make_factors(length, activation="relu", **kwargs)
    parts = {n: (getattr(factors, n) * 1.5).round() for n in ("q_BTJI", "k_BSI", "bias_J")}
    return replace(factors, weight_BTJ=(factors.weight_BTJ * 3).round(), scale=0.5, **parts)


def assert_same_choice(got, expected, factors, docs):
    """Equal but for blocks whose scores lie within one step of the comparison (2^-11) of the
    last one chosen."""
    scores = block_score_matrix(exact(factors), got.spec.key_block, docs)
    anchors = scores[:, :, got.layout.anchor_Q - factors.q_start]
    n = anchors.shape[-1]
    for a, b, row in zip(
        got.blocks_BHQN.flatten(0, 2).tolist(),
        expected.blocks_BHQN.flatten(0, 2).tolist(),
        anchors.flatten(0, 2),
    ):
        kept = [j for j in a if j >= 0]
        assert kept == sorted(set(kept)) and a[len(kept) :] == [-1] * (len(a) - len(kept))
        assert len(kept) == sum(j >= 0 for j in b) and all(j < n for j in kept)
        if a != b:
            last = min(float(row[j]) for j in b if j >= 0)
            for j in set(kept) ^ {j for j in b if j >= 0}:
                assert abs(float(row[j]) - last) <= 2**-11 * abs(last), (j, a, b)


def random_rows(kind, rows, columns):
    g = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(1, 1, rows, columns, generator=g)
    if kind == "equal":
        x = torch.full_like(x, 0.3)
    elif kind == "saturated":
        x = (x > 0).float()
    elif kind == "giant":
        x[..., columns // 2] = 3e38
    elif kind == "nearly equal":
        x = 1 + x * 1e-4
    elif kind == "signs and holes":
        x[..., ::3], x[..., 1::5], x[..., 2::7] = -0.0, 0.0, -torch.inf
    elif kind == "clustered":  # the largest in few residue classes, all others equal
        near = torch.arange(columns) % 2048 < 10
        x = torch.where(near, x.abs() + 1, torch.full_like(x, 0.5))
    elif kind == "tiny":
        x = x * 1e-41
    elif kind == "nothing":
        x = torch.full_like(x, -torch.inf)
    elif kind == "sigmoid":
        x = (x * 3).sigmoid()
    return x.to(DEVICE)


KINDS = ("normal", "sigmoid", "equal", "saturated", "giant", "nearly equal")
KINDS = (*KINDS, "clustered", "signs and holes", "tiny", "nothing")


def check_top(scores, wanted, width, columns=None):
    from gsa_kernels.select import ops

    columns = scores.shape[-1] if columns is None else columns
    expected = top_blocks(comparable(scores[..., :columns]), wanted, min(width, columns))
    each = wanted.to(torch.int32)
    got = ops.top_blocks(scores, columns, each, width, width, None, [], 0)
    assert torch.equal(got[..., : expected.shape[-1]], expected)
    assert (got[..., expected.shape[-1] :] == -1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 63, 300])
def test_top_blocks_bit_for_bit(kind, columns):
    scores = random_rows(kind, 5, columns)
    check_top(scores, torch.tensor([[[0, 1, 20, 64, 40]]], device=DEVICE), 64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [30, 1500])
def test_top_blocks_of_long_rows(kind, width, monkeypatch):
    """Shortened first; equal scores overflow the list and take the exact path."""
    from gsa_kernels.select import triton_launch

    monkeypatch.setattr(triton_launch, "LONGEST", 1000)
    scores = random_rows(kind, 2, 5000)
    check_top(scores, torch.tensor([[[width, width // 2 + 1]]], device=DEVICE), width, 4999)


CASES = [  # C, R, T, index heads, selection heads, width, block score
    (16, 16, 1, 4, 1, 8, "mean"),
    (16, 16, 63, 4, 2, 8, "mean"),
    (16, 16, 100, 2, 1, 24, "max"),
    (5, 7, 100, 8, 2, 8, "max"),
    (5, 7, 100, 1, 1, 8, "mean"),
    (8, 32, 130, 4, 4, 8, "mean"),
    (16, 1, 63, 4, 1, 8, "mean"),
    (1, 1, 40, 4, 1, 8, "max"),
    (1, 16, 100, 4, 2, 8, "mean"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@documents
def test_exact_scores_choose_the_same(case, documents):
    c, r, length, index_heads, heads, width, block_score = case
    given = dict(index_heads=index_heads, heads=heads, width=width)
    factors = low(whole_numbers(length, block_score="max" if c > 1 else block_score, **given))
    # Without sinks a document's first block, which it shares, may be chosen, or not.
    sinks, k = (0, 20) if c == 5 else (3, 45)
    spec = SelectionSpec(c, r, window=7, sinks=sinks, heads=heads)
    docs = docs_of(length, documents)
    got = select(factors, spec, k, k, length, docs, impl="triton").selection
    for impl in ("eager", "reference"):
        expected = select(exact(factors), spec, k, k, length, docs, impl=impl).selection
        assert torch.equal(got.blocks_BHQN, expected.blocks_BHQN), impl


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[4]], ids=str)
@documents
def test_any_scores_choose_the_same_up_to_ties(case, dtype, documents):
    c, r, length, index_heads, heads, width, block_score = case
    given = dict(index_heads=index_heads, heads=heads, width=width, block_score=block_score)
    factors = low(make_factors(length, **given), dtype)
    spec = SelectionSpec(c, r, window=7, sinks=3, heads=heads)
    docs = docs_of(length, documents)
    got = select(factors, spec, 45, 45, length, docs, impl="triton").selection
    expected = select(exact(factors), spec, 45, 45, length, docs, impl="eager").selection
    assert_same_choice(got, expected, factors, docs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [1, 5, 16, 200])
@documents
def test_mean_keys(block, dtype, documents):
    """The sum of the parts is as good as a float32."""
    from gsa_kernels.index_score import ops

    k = torch.randn(2, 410, 24, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    docs = docs_of(410, documents)
    mean = pool_keys(k.double(), block, docs)[:, : 410 // block]
    parts = 1 if dtype == torch.float32 else 3
    got = ops.pool_keys(k, docs, block, parts)
    assert got.shape == (2, 410 // block, parts, 24)
    torch.testing.assert_close(got.double().sum(2), mean, rtol=2e-7, atol=1e-7)
    eager = pool_keys(k, block, docs)[:, : 410 // block]
    torch.testing.assert_close(eager.double(), mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
@pytest.mark.parametrize("block_score", ["mean", "max"])
@pytest.mark.parametrize("sharp", [1.0, 8.0])
def test_scores_are_good_to_far_more_than_the_compared_bits(dtype, activation, block_score, sharp):
    from gsa_kernels.select.kernels import FactorRows

    factors = make_factors(100, width=40, activation=activation, block_score=block_score)
    factors = low(replace(factors, scale=factors.scale * sharp), dtype)
    spec = SelectionSpec(8, 16, window=7, sinks=3)
    rows = FactorRows(factors, spec, None, None)
    got = rows.score(slice(0, 7), 11).scores.double()
    expected = block_score_matrix(exact(factors), 8)[:, :, ::16][..., :11]
    candidates = got > -torch.inf
    assert candidates.sum() == 2 * sum(max(0, max(0, 16 * i - 6) // 8 - 1) for i in range(7))
    # A step of the comparison is 2^-12 of a score or more. Signed ReLU sums cancel, so theirs is
    # measured by the largest.
    error = (got - expected)[candidates].abs()
    size = expected[candidates].abs()
    size = size if activation == "sigmoid" else size.amax()
    assert (error / size).max() < 2**-15


def test_queries_and_keys_of_different_precision():
    factors = low(whole_numbers(63, block_score="max"))
    spec = SelectionSpec(8, 16, window=7, sinks=3)
    mixed = replace(factors, q_BTJI=factors.q_BTJI.half(), weight_BTJ=factors.weight_BTJ.half())
    got = select(mixed, spec, 30, 30, 63, impl="triton").selection.blocks_BHQN
    assert torch.equal(got, select(factors, spec, 30, 30, 63, impl="eager").selection.blocks_BHQN)


@documents
@pytest.mark.parametrize("granularity", [(16, 16), (8, 32)], ids=granularity_id)
@pytest.mark.parametrize("cuts", [[50], [16, 17, 48, 99]], ids=str)
def test_in_pieces(granularity, cuts, documents):
    docs = docs_of(100, documents)
    factors = low(whole_numbers(100))
    spec = SelectionSpec(*granularity, window=7, sinks=3)
    whole = select(factors, spec, 45, 45, 100, docs, impl="triton").selection
    tail = None
    for start, stop in zip([0, *cuts], [*cuts, 100]):
        piece = replace(
            factors,
            q_BTJI=factors.q_BTJI[:, start:stop],
            weight_BTJ=factors.weight_BTJ[:, start:stop],
            k_BSI=factors.k_BSI[:, :stop],
            q_start=start,
        )
        part = select(piece, spec, 45, 45, stop - start, docs, tail, impl="triton").selection
        expected = whole.to_dense_mask()[:, :, start:stop, :stop]
        assert torch.equal(part.to_dense_mask(), expected)
        tail = part.tail()


@pytest.mark.parametrize("granularity", [(1, 1), (16, 1)], ids=granularity_id)
def test_one_new_query_of_several_sequences(granularity):
    factors = low(whole_numbers(300, batch=3, block_score="max"))
    last = replace(factors.rows(torch.tensor([299], device=DEVICE)), q_start=299)
    spec = SelectionSpec(*granularity, window=7, sinks=3)
    got = select(last, spec, 150, 150, 1, impl="triton").selection.blocks_BHQN
    expected = select(last, spec, 150, 150, 1, impl="eager").selection.blocks_BHQN
    assert torch.equal(got, expected)


def by_variance(statistics):
    return 20 + (statistics["variance"] * 1000).long() % 30


@documents
def test_rules_and_statistics(documents):
    factors, docs = low(make_factors(100, heads=2)), docs_of(100, documents)
    spec = SelectionSpec(8, 16, window=7, sinks=3, heads=2)
    got, expected = (
        select(factors, spec, by_variance, 50, 100, docs, None, STATISTICS, impl=impl)
        for impl in ("triton", "eager")
    )
    for name in STATISTICS[:-1]:
        torch.testing.assert_close(
            got.statistics[name], expected.statistics[name], rtol=1e-4, atol=1e-6
        )
    bins = [x.statistics["histogram"] for x in (got, expected)]
    assert torch.equal(bins[0].sum(-1), bins[1].sum(-1))
    count = got.selection.counts_BHQ
    wanted = (by_variance(got.statistics) - 7 - 8).clamp_min(0) // 8
    assert torch.equal(count, torch.minimum(wanted, got.statistics["count"].long()))


def test_chunks_of_rows_are_the_whole(monkeypatch):
    from gsa_kernels.select import kernels

    factors, docs = low(make_factors(130)), docs_of(130, True)
    spec = SelectionSpec(8, 16, window=7, sinks=3)
    whole = select(factors, spec, 60, 60, 130, docs, impl="triton").selection
    monkeypatch.setattr(kernels, "SCORES_HELD", 30)
    pieces = select(factors, spec, 60, 60, 130, docs, impl="triton").selection
    assert torch.equal(pieces.blocks_BHQN, whole.blocks_BHQN)


def others(length):
    base = low(make_factors(length))
    parts = (base.q_BTJI, base.k_BSI, base.weight_BTJ, base.bias_J, base.scale)
    yield PooledFactors(*parts, pool=16)
    yield RandomScores(base.k_BSI[..., :0], length)


def test_other_scores_are_chosen_by_the_kernel_too():
    spec = SelectionSpec(8, 16, window=7, sinks=3)
    for factors in others(100):
        got, expected = (
            select(factors, spec, 45, 45, 100, docs_of(100, True), impl=impl).selection
            for impl in ("triton", "eager")
        )
        assert torch.equal(got.blocks_BHQN, expected.blocks_BHQN), type(factors)


@pytest.mark.skipif(DEVICE == "cuda", reason="an assertion on a GPU ends the process")
@pytest.mark.parametrize("part", ["q_BTJI", "k_BSI", "weight_BTJ"])
@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
@pytest.mark.parametrize("block_score", ["mean", "max"])
def test_nan_is_refused(part, activation, block_score):
    factors = low(make_factors(100, activation=activation, block_score=block_score))
    bad = getattr(factors, part).clone()
    bad[1, [20, 96]] = torch.nan
    spec = SelectionSpec(8, 16, window=8)
    with pytest.raises(ValueError, match="not finite"):
        select(replace(factors, **{part: bad}), spec, 40, 40, 100, impl="triton")
    late = getattr(factors, part).clone()
    late[1, 97:] = torch.nan  # no anchor and no candidate
    select(replace(factors, **{part: late}), spec, 40, 40, 100, impl="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="an assertion on a GPU ends the process")
def test_nan_in_a_long_row_and_of_any_bits(monkeypatch):
    from gsa_kernels.select import ops, triton_launch

    scores = torch.zeros(1, 1, 1, 3000)
    scores[..., 2500] = (
        torch.tensor(-1, dtype=torch.int32).bitwise_and(0x7FFFFFFF).view(torch.float32)
    )
    assert comparable(scores).isnan().sum() == 1
    for longest in (4096, 1000):
        monkeypatch.setattr(triton_launch, "LONGEST", longest)
        with pytest.raises(ValueError, match="not finite"):
            ops.top_blocks(scores, 3000, None, 5, 5, None, [], 0)
        ops.top_blocks(scores, 2500, None, 5, 5, None, [], 0)


def test_no_result_depends_on_uninitialised_memory(monkeypatch):
    factors, docs = low(make_factors(100)), docs_of(100, True)
    spec = SelectionSpec(8, 16, window=7, sinks=3)

    def run(names):
        return select(factors, spec, 45, 45, 100, docs, None, names, impl="triton")

    clean = run(STATISTICS)
    made = []
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made.append(empty(*args, **kwargs))
        return made[-1].fill_(torch.nan if made[-1].is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)
    for names in ((), STATISTICS):
        dirty = run(names)
        assert torch.equal(dirty.selection.blocks_BHQN, clean.selection.blocks_BHQN)
    assert len(made) == 6
    torch.testing.assert_close(dirty.statistics, clean.statistics, rtol=0, atol=0)


def test_operators_are_registered_truthfully():
    from gsa_kernels.index_score import ops as score_ops
    from gsa_kernels.select import ops

    factors, docs = low(make_factors(50), torch.float16), docs_of(50, True)
    checks = ("test_schema", "test_faketensor")
    opcheck = torch.library.opcheck
    opcheck(score_ops.pool_keys_operator, (factors.k_BSI, docs, 8, 3), test_utils=checks)
    keys = score_ops.pool_keys(factors.k_BSI, docs, 8, 3)
    sizes, tiles = [8, 16, 7, 3], [1, 4, 4]
    args = (factors.q_BTJI, keys, factors.weight_BTJ, factors.bias_J, docs)
    args = (*args, [*sizes, 0], tiles, 0.3, True, 2, False)
    opcheck(score_ops.block_scores_operator, args, test_utils=checks)
    scores = score_ops.block_scores(*args)
    args = (scores, 4, None, 3, 3, docs, sizes, 1)
    opcheck(ops.top_blocks_operator, args, test_utils=checks)


@documents
def test_one_compiled_graph(documents):
    factors, docs = low(whole_numbers(63)), docs_of(63, documents)
    spec = SelectionSpec(8, 16, window=7, sinks=3)

    def choose(q):
        chosen = select(replace(factors, q_BTJI=q), spec, 45, 45, 63, docs, impl="triton")
        return chosen.selection.blocks_BHQN + 1

    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(factors.q_BTJI), choose(factors.q_BTJI))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("granularity", [(64, 64), (64, 1), (1, 1)], ids=granularity_id)
def test_captured_in_a_cuda_graph(granularity):
    factors = low(make_factors(6000, width=64), torch.bfloat16)
    spec = SelectionSpec(*granularity, window=128, sinks=64)

    def step():
        return select(factors, spec, 1024, 1024, 6000, impl="triton").selection.blocks_BHQN

    graph, captured = captured_in_a_graph(step)
    factors.q_BTJI.normal_()
    graph.replay()
    assert torch.equal(captured, step())
    expected = select(factors, spec, 1024, 1024, 6000, impl="eager").selection
    # Sums in another order move few scores over a step of the comparison.
    different = (captured != expected.blocks_BHQN).any(-1).float().mean()
    assert different < (0.9 if granularity == (1, 1) else 0.2)


def test_refusals():
    factors = make_factors(40)
    for bad, c, word in (
        (low(factors, torch.float64), 8, "float64"),
        (low(make_factors(40, width=130)), 8, "index channels"),
        (low(make_factors(400, block_score="max")), 130, "128 keys"),
    ):
        length = bad.n_queries
        with pytest.raises(ValueError, match=word):
            select(bad, SelectionSpec(c, 16), 400, 400, length, impl="triton")
        select(bad, SelectionSpec(c, 16), 400, 400, length)
