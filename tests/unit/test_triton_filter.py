"""Single keys chosen from lists of those scores that reach a guessed threshold: exactly.

The path that writes all scores is held against eager in test_triton_select.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import make_factors
from test_triton_select import DEVICE, DTYPES, docs_of, documents, low, whole_numbers

from gsa_kernels.select import select
from gsa_kernels.selection import SelectionSpec

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from gsa_kernels.select.triton_filter import least_score  # noqa: E402
from gsa_kernels.select.triton_select import ordered  # noqa: E402

pytestmark = pytest.mark.kernel

KEYS, QUERIES = 300, 8
SPEC = SelectionSpec(1, 1, window=7, sinks=2)


@pytest.fixture
def short_lists(monkeypatch):
    """Rows of more than 40 keys count as long; the function sets how many scores lists hold."""
    from gsa_kernels.select import (
        filter_launch,
        filtering,
        kernels,
        statistics_launch,
        triton_launch,
    )

    plan = filtering.plan

    def apply(places=128, rows=1000):
        def shorter(*args):
            found = plan(*args)
            return None if found is None else replace(found, places=places, rows=rows)

        for module in (kernels, triton_launch):
            monkeypatch.setattr(module, "LONGEST", 40)
        monkeypatch.setattr(filter_launch, "PROGRAMS", 3)
        monkeypatch.setattr(statistics_launch, "SEGMENT", 128)
        monkeypatch.setattr(filtering, "EVERY", 4)
        monkeypatch.setattr(filtering, "ROWS", 1)
        monkeypatch.setattr(filtering, "plan", shorter)

    return apply


@pytest.fixture
def misjudged(monkeypatch):
    """(rows, how many of them had too few scores listed, or too many) of each launch."""
    from gsa_kernels.select import filter_launch

    seen = []
    run = filter_launch.run

    def watched(kernel, grid, *args, **constants):
        if kernel is filter_launch.pick_kernel:
            count, bound = args[1].sum(-1), args[2]
            want = args[3] if constants["HAS_WANTED"] else args[10]
            few = (count < want) & (bound > -torch.inf)
            many = count > constants["CAP"]
            seen.append((count.numel(), int(few.sum()), int(many.sum())))
        run(kernel, grid, *args, **constants)

    monkeypatch.setattr(filter_launch, "run", watched)
    return seen


def late(dtype=torch.float16, queries=QUERIES, **kwargs):
    """The last queries of a sequence."""
    factors = low(make_factors(KEYS, **kwargs), dtype)
    start = KEYS - queries
    return replace(factors.rows(torch.arange(start, KEYS, device=DEVICE)), q_start=start)


def choice(factors, docs=None, spec=SPEC, k=30):
    chosen = select(factors, spec, k, k, factors.n_queries, docs, impl="triton")
    return chosen.selection.blocks_BHQN


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
@documents
def test_the_same_choice(short_lists, misjudged, dtype, activation, documents):
    factors = late(dtype, heads=2, activation=activation)
    spec, docs = replace(SPEC, heads=2), docs_of(KEYS, documents)
    expected = choice(factors, docs, spec)
    short_lists()
    assert torch.equal(choice(factors, docs, spec), expected)
    ((rows, few, many),) = misjudged
    assert rows == 4 * QUERIES and few + many <= rows // 8


@documents
def test_keys_of_one_byte(short_lists, misjudged, documents):
    from gsa_kernels.index_score.api import fp8_keys

    factors, docs = late(), docs_of(KEYS, documents)
    with torch.no_grad():
        factors = replace(factors, k_BSI=fp8_keys(factors.k_BSI))
    expected = choice(factors, docs)
    short_lists()
    assert torch.equal(choice(factors, docs), expected) and (expected >= 0).any()
    ((rows, few, many),) = misjudged
    assert rows == 2 * QUERIES and few + many <= rows // 8


@documents
@pytest.mark.parametrize(
    "spec",
    [SPEC, SelectionSpec(1, 4, window=7), SelectionSpec(1, 1, window=1, sinks=100)],
    ids=["token", "tile", "sinks"],
)
def test_chunks_of_rows(short_lists, misjudged, spec, documents):
    factors, docs = late(index_heads=3, width=24), docs_of(KEYS, documents)
    k = 20 + spec.sinks
    expected = choice(factors, docs, spec, k)
    short_lists(rows=5)
    assert torch.equal(choice(factors, docs, spec, k), expected)
    tiles = QUERIES // spec.query_tile
    assert [rows for rows, _, _ in misjudged][1:] == ([6] if tiles == 8 else [])


def test_short_rows_before_long_ones(short_lists, misjudged):
    factors = low(make_factors(60, batch=1), torch.float16)
    expected = choice(factors)
    short_lists()
    assert torch.equal(choice(factors), expected)
    assert misjudged == [(20, 0, 0)]


@documents
@pytest.mark.parametrize("wrong", ["few", "many"])
@pytest.mark.parametrize("programs", [1, 40], ids=["loops", "splits"])
def test_rows_whose_guess_was_wrong(
    short_lists, misjudged, monkeypatch, wrong, documents, programs
):
    from gsa_kernels.select import filter_launch, filtering

    factors, docs = late(activation="relu", queries=20), docs_of(KEYS, documents)
    expected = choice(factors, docs)
    short_lists(places=64 if wrong == "many" else 128)
    monkeypatch.setattr(filter_launch, "EXACT_ROWS", 16)
    monkeypatch.setattr(filter_launch, "PROGRAMS", programs)
    sample_of = filtering.sample_of
    better = 1.0 if wrong == "many" else 3.0
    monkeypatch.setattr(filtering, "sample_of", lambda k, stride: sample_of(k, stride) * better)
    assert torch.equal(choice(factors, docs), expected)
    ((_, *found),) = misjudged
    assert found[wrong == "many"] > 0


def kept(kind, factors):
    """Factors whose scores a sample misleads about."""
    k, position = factors.k_BSI.clone(), torch.arange(KEYS, device=DEVICE)
    if kind == "equal":
        k[:] = k[:, :1]
    elif kind == "few values":
        k[:] = k[:, position % 3]
    elif kind == "saturated":
        k = k.sign() * 1000
    elif kind == "giant":
        k[:, 150] *= 1e4
    elif kind == "sorted":
        k = k[:, :1] * (position / 50)[:, None]
    elif kind == "backwards":
        k = k[:, :1] * (6 - position / 50)[:, None]
    elif kind == "period":
        k = torch.where((position % 4 == 1)[:, None], k, k[:, :1])
    return replace(factors, k_BSI=k)


@pytest.mark.parametrize(
    "kind", ["equal", "few values", "saturated", "giant", "sorted", "backwards", "period"]
)
@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
def test_scores_that_mislead_a_sample(short_lists, kind, activation):
    factors = kept(kind, late(activation=activation))
    expected = choice(factors)
    short_lists()
    assert torch.equal(choice(factors), expected)


def by_row(statistics):
    """Budgets from 0 keys left to all of the 30, in no order of the rows."""
    count, largest = statistics["count"], statistics["max"]
    return 9 + (largest * 1e4 + count).long() % 22


def names_of(rule):
    return ("max",) if rule is by_row else ("variance", "entropy")


def by_spread(statistics):
    ratio = statistics["variance"] * 100 - statistics["entropy"]
    return (20 * ratio).long().clamp(0, 30)


def adaptive(factors, docs, spec, rule, k=30):
    names = names_of(rule)
    return select(factors, spec, rule, k, factors.n_queries, docs, None, names, impl="triton")


@documents
@pytest.mark.parametrize(
    "spec, rows, places, rule",
    [
        (SPEC, 1000, 128, by_row),
        (SPEC, 12, 32, by_spread),
        (SelectionSpec(1, 4, window=7), 2, 128, by_spread),
    ],
    ids=["token", "chunks", "tile"],
)
def test_budgets_that_follow_statistics(
    short_lists, misjudged, spec, rows, places, rule, documents
):
    factors, docs = late(queries=24), docs_of(KEYS, documents)
    short_lists(places, rows)
    got = adaptive(factors, docs, spec, rule)
    assert sum(rows for rows, _, _ in misjudged) == 2 * 24 // spec.query_tile
    assert places == 128 or any(many for _, _, many in misjudged)
    budgets = rule(got.statistics)
    left = (budgets - spec.window - spec.sinks).clamp_min(0)
    assert torch.equal((got.selection.blocks_BHQN >= 0).sum(-1), left)
    assert left.unique().numel() > 4

    scores = {}

    def written(statistics):
        scores.update(statistics)
        return budgets

    names = (*names_of(rule), "histogram")  # of every score
    expected = select(factors, spec, written, 30, 24, docs, None, names, impl="triton")
    assert len(misjudged) == -(-24 // spec.query_tile // rows)
    assert torch.equal(got.selection.blocks_BHQN, expected.selection.blocks_BHQN)
    for name in ("count", *names_of(rule)):
        torch.testing.assert_close(got.statistics[name], scores[name], rtol=1e-5, atol=1e-6)


def test_budgets_of_short_rows_before_long_ones_and_of_few_rows(short_lists, monkeypatch):
    """The same for a whole sequence, its last queries, and one query at a time."""
    from gsa_kernels.select import filtering

    factors = replace(low(whole_numbers(60), torch.float16), activation="sigmoid", scale=0.1)
    short_lists()
    whole = adaptive(factors, None, SPEC, by_spread)
    monkeypatch.setattr(filtering, "ROWS", 10**6)  # no lists
    for start, stop in [(30, 60), (40, 41), (59, 60)]:
        rows = factors.rows(torch.arange(start, stop, device=DEVICE))
        piece = replace(rows, q_start=start, k_BSI=factors.k_BSI[:, :stop])
        got = adaptive(piece, None, SPEC, by_spread)
        for name in whole.statistics:
            expected = whole.statistics[name][:, :, start:stop]
            assert torch.equal(got.statistics[name], expected), (name, start)
        blocks = got.selection.blocks_BHQN
        assert torch.equal(
            blocks, whole.selection.blocks_BHQN[:, :, start:stop, : blocks.shape[-1]]
        )


def test_budgets_go_on_inside_a_tile(short_lists):
    factors = replace(low(whole_numbers(100), torch.float16), activation="sigmoid", scale=0.1)
    spec, names = SelectionSpec(1, 4, window=7), ("variance", "entropy")
    short_lists()
    whole = adaptive(factors, None, spec, by_spread)
    tail = None
    for start, stop in [(0, 58), (58, 75), (75, 100)]:
        rows = factors.rows(torch.arange(start, stop, device=DEVICE))
        piece = replace(rows, q_start=start, k_BSI=factors.k_BSI[:, :stop])
        given = (by_spread, 30, stop - start, None, tail, names)
        got = select(piece, spec, *given, impl="triton").selection
        expected = whole.selection.rows(start, stop).blocks_BHQN[..., : got.blocks_BHQN.shape[-1]]
        assert torch.equal(got.blocks_BHQN, expected)
        tail = got.tail()


@pytest.mark.skipif(DEVICE == "cuda", reason="an assertion on a GPU ends the process")
def test_nan_is_refused_whatever_the_budget(short_lists):
    short_lists()
    factors = late()
    factors.k_BSI[1, 30] = torch.nan
    for rule in (by_spread, lambda statistics: torch.zeros_like(statistics["count"]).long()):
        with pytest.raises(ValueError, match="not finite"):
            adaptive(factors, None, SPEC, rule)


@pytest.mark.parametrize("places", [64, 256])
@pytest.mark.parametrize("part", ["q_BTJI", "k_BSI", "weight_BTJ"])
@pytest.mark.skipif(DEVICE == "cuda", reason="an assertion on a GPU ends the process")
def test_nan_is_refused(short_lists, places, part):
    short_lists(places)
    factors = late()
    bad = getattr(factors, part).clone()
    bad[1, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        choice(replace(factors, **{part: bad}))
    late_key = factors.k_BSI.clone()
    late_key[:, -5:] = torch.nan  # no candidate
    choice(replace(factors, k_BSI=late_key))


def test_no_result_depends_on_uninitialised_memory(short_lists, monkeypatch):
    factors, docs = late(), docs_of(KEYS, True)
    expected = choice(factors, docs)
    short_lists(places=64)
    rule = adaptive(factors, docs, SPEC, by_spread).selection.blocks_BHQN
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan if made.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)
    assert torch.equal(choice(factors, docs), expected)
    got = adaptive(factors, docs, SPEC, by_spread).selection.blocks_BHQN
    assert torch.equal(got, rule)


@triton.jit
def keys_kernel(x_ptr, key_ptr, least_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    key = ordered(tl.load(x_ptr + n), n >= 0)
    tl.store(key_ptr + n, key)
    tl.store(least_ptr + n, least_score(key))


def test_thresholds_are_the_least_scores_of_their_key():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4096, generator=g) * 2.0 ** torch.randint(-140, 120, (4096,), generator=g)
    x[:4] = torch.tensor([0.0, -0.0, torch.inf, 1e-45])

    def keys(x):
        key, least = torch.empty(4096, dtype=torch.int32, device=DEVICE), torch.empty_like(x)
        keys_kernel[(1,)](x, key, least, N=4096)
        return key, least

    key, least = keys(x.to(DEVICE))
    assert (least <= x.to(DEVICE)).all() and torch.equal(keys(least)[0], key)
    lower = torch.nextafter(least, torch.full_like(least, -torch.inf))
    assert (keys(lower)[0] < key).all()


def test_plans():
    from gsa_kernels.select.filtering import plan

    def of(keys, width, queries=None):
        shape = (1, keys if queries is None else queries)
        factors = replace(
            make_factors(1),
            q_BTJI=torch.empty(*shape, 4, 64, device="meta", dtype=torch.bfloat16),
            k_BSI=torch.empty(1, keys, 64, device="meta", dtype=torch.bfloat16),
            weight_BTJ=torch.empty(*shape, 4, device="meta"),
        )
        return plan(factors, SPEC, width, shape[1], 4096)

    found = of(131072, 1856)
    assert (found.places, found.stride, found.rows) == (4096, 16, 8192)
    assert of(1 << 20, 1856).stride == 32 and of(1 << 20, 1856).places == 8192
    assert of(4096, 1856) is None and of(131072, 1856, queries=1) is None
    assert of(131072, 12000) is None


def test_operator_is_registered_truthfully(monkeypatch):
    from gsa_kernels.select import filter_launch, filtering, ops

    monkeypatch.setattr(filter_launch, "PROGRAMS", 3)
    factors, docs = late(), docs_of(KEYS, True)
    sample = filtering.sample_of(factors.k_BSI, 4)
    args = (factors.q_BTJI, factors.k_BSI, sample, factors.weight_BTJ, factors.bias_J, docs)
    rest = (9, 10, [1, 7, 3, factors.q_start], [293, 298, 291], 64, 4, 0.3, True, 1)
    wanted = torch.full((2, 1, 5), 7, dtype=torch.int32, device=DEVICE)
    for each in (None, wanted):
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(ops.filtered_keys_operator, (*args, each, *rest), test_utils=checks)


def test_one_compiled_graph(short_lists):
    factors = late(queries=4)
    short_lists()

    def choose(q, by_rule):
        given = replace(factors, q_BTJI=q)
        if by_rule:
            return adaptive(given, None, SPEC, by_spread).selection.blocks_BHQN + 1
        return choice(given) + 1

    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")
    for by_rule in (False, True):
        expected = choose(factors.q_BTJI, by_rule)
        assert torch.equal(compiled(factors.q_BTJI, by_rule), expected)
