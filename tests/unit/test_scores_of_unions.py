"""Gradient of listed scores by unions of neighbouring queries' lists, against float64.

On a machine without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import captured_in_a_graph, make_factors, make_selection
from test_triton_indexer_loss import DEVICE, check, moved, on

from gsa_kernels import dispatch
from gsa_kernels.index_score.api import scores_at
from gsa_kernels.selection import Selection, SelectionSpec

at_launch = pytest.importorskip("gsa_kernels.index_score.at_launch")
union_launch = pytest.importorskip("gsa_kernels.index_score.at_union_launch")

pytestmark = pytest.mark.kernel

# Triton's interpreter multiplies bfloat16 matrices as if they were integers.
HALF = [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


@pytest.fixture
def ran(monkeypatch):
    """Launches of the kernel over unions, which takes any number of queries."""
    found = []

    def run(kernel, grid, *args, **constants):
        found.append(grid)
        return original(kernel, grid, *args, **constants)

    original = union_launch.run
    monkeypatch.setattr(union_launch, "run", run)
    monkeypatch.setattr(union_launch, "FEWEST", 1)
    return found


def by_kernels(call):
    """Take the kernels wherever tensors are on DEVICE, also where that is a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(dispatch, "_triton_reason", lambda *_: "")
        return call()


def lists(length, start, slots, heads=1, kind="random"):
    """A selection of `length` queries, each of up to `slots` single keys up to itself.

    kind: "same" keys for all, keys of "one" query each, or a "random" number of random ones.
    """
    g = torch.Generator().manual_seed(length)
    position = torch.arange(start, start + length)
    key = torch.arange(start + length)
    rank = torch.rand(2, heads, length, start + length, generator=g)
    if kind == "same":
        rank = key.expand_as(rank) / len(key)
    elif kind == "one":
        rank = (((key - position[:, None]) % 16) / 16).expand_as(rank)
    rank = rank.masked_fill(key > position[:, None], 2)
    kept = rank.sort(-1)
    number = torch.randint(0, slots + 1, (2, heads, length, 1), generator=g)
    if kind != "random":
        number = torch.full_like(number, slots)
    limit = 1 / 16 if kind == "one" else 1.5
    there = (torch.arange(len(key)) < number) & (kept.values < limit)
    blocks = kept.indices.masked_fill(~there, len(key)).sort(-1).values[..., :slots]
    blocks = torch.nn.functional.pad(blocks, (0, max(0, slots - len(key))), value=len(key))
    blocks = blocks.masked_fill(blocks == len(key), -1).to(torch.int32)
    spec = SelectionSpec(1, 1, window=1, heads=heads)
    return Selection(spec, blocks, length, start + length, start)


def factors_of(selection, **settings):
    made = make_factors(selection.n_keys, heads=selection.spec.heads, seed=3, **settings)
    start = selection.q_start
    return replace(
        made, q_BTJI=made.q_BTJI[:, start:], weight_BTJ=made.weight_BTJ[:, start:], q_start=start
    )


def check_scores(factors, selection, dtype):
    check(by_kernels, lambda f: scores_at(f, on(selection, f.k_BSI.device)), factors, dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("length", "start", "slots"),
    [(1, 0, 4), (63, 0, 20), (100, 0, 128), (100, 37, 30), (17, 111, 5), (1, 31, 32)],
)
@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
def test_lengths(ran, length, start, slots, activation, dtype):
    selection = lists(length, start, slots)
    check_scores(factors_of(selection, activation=activation), selection, dtype)
    assert ran == [(-(-(start % 16 + length) // 16), 2)]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("index_heads", "heads", "width"),
    [(1, 1, 64), (2, 1, 8), (4, 1, 100), (2, 2, 24), (4, 2, 64), (8, 2, 8)],
)
def test_heads_and_widths(ran, index_heads, heads, width, dtype):
    selection = lists(50, 5, 20, heads)
    factors = factors_of(selection, index_heads=index_heads, width=width)
    check_scores(factors, selection, dtype)
    assert len(ran) == (dtype == torch.bfloat16 or width <= 64)


@pytest.mark.parametrize("kind", ["same", "one"])
def test_keys_of_all_queries_and_of_one(ran, kind):
    selection = lists(80, 16, 24, kind=kind)
    keys = selection.blocks_BHQN[0, 0, 48:64]
    times = keys[keys >= 0].unique(return_counts=True)[1]
    assert (times == (16 if kind == "same" else 1)).all()
    check_scores(factors_of(selection), selection, torch.float16)
    assert len(ran) == 1


def test_equal_scores(ran):
    selection = lists(40, 0, 40)
    made = factors_of(selection)
    equal = replace(made, q_BTJI=torch.zeros_like(made.q_BTJI))
    check_scores(equal, selection, torch.float16)
    assert len(ran) == 1


def gradients_of(selection, bias, start):
    """at_launch.gradients, with `start`, of some factors in half precision."""
    low = moved(factors_of(selection), torch.float16, DEVICE)
    blocks = selection.blocks_BHQN.to(DEVICE)
    g = torch.Generator().manual_seed(1)
    dscore = 1e-2 * torch.randn(blocks.shape, generator=g).to(DEVICE)
    parts = [x.detach().contiguous() for x in (low.q_BTJI, low.k_BSI, low.weight_BTJ)]
    return at_launch.gradients(
        dscore, *parts, low.bias_J.detach() if bias else None, blocks, None, 1, 0.3, True, start
    )


@pytest.mark.parametrize("bias", [False, True])
def test_the_kernel_of_single_lists_agrees(ran, bias):
    selection = lists(70, 21, 33)
    got = gradients_of(selection, bias, 21)
    assert len(ran) == 1
    expected = gradients_of(selection, bias, -1)
    assert len(ran) == 1
    for a, b in zip(got, expected):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype and a.abs().max() > 0
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-7)


def test_parts_of_all_groups_and_uninitialised_memory(ran, monkeypatch):
    from gsa_kernels.index_score import at_union_launch

    selection = lists(600, 0, 20)
    whole = gradients_of(selection, True, 0)
    monkeypatch.setattr(at_union_launch, "SCRATCH", 1 << 16)

    def poisoned(make):
        def call(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(1 << 20)

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    in_parts = gradients_of(selection, True, 0)
    assert len(ran) > 2 and sum(grid[0] for grid in ran[1:]) == ran[0][0]
    for a, b in zip(in_parts, whole):
        torch.testing.assert_close(a, b)


def test_others_keep_the_kernel_of_single_lists(ran, monkeypatch):
    selection = lists(40, 0, 20)
    check_scores(factors_of(selection), selection, torch.float32)
    check_scores(factors_of(selection, index_heads=8), selection, torch.float16)
    monkeypatch.setattr(union_launch, "FEWEST", 81)
    check_scores(factors_of(selection), selection, torch.float16)
    monkeypatch.setattr(union_launch, "FEWEST", 1)
    for granularity in ((1, 16), (4, 1)):
        selection = make_selection(63, granularity)
        check_scores(make_factors(63), selection, torch.float16)
    assert not ran


def test_the_operator_is_registered_truthfully(ran):
    from gsa_kernels.index_score.at_ops import listed_scores_operator

    selection = lists(20, 5, 9)
    low = moved(factors_of(selection), torch.float16, DEVICE)
    parts = (low.q_BTJI, low.k_BSI, low.weight_BTJ, low.bias_J)
    parts = [x.detach().contiguous().requires_grad_() for x in parts]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    args = (*parts, selection.blocks_BHQN.to(DEVICE), None, 1, 0.3, True, 5)
    torch.library.opcheck(listed_scores_operator, args, test_utils=checks)
    listed_scores_operator(*args).nan_to_num(neginf=0).sum().backward()
    assert len(ran) == 1 and all(x.grad.abs().max() > 0 for x in parts)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_the_gradient_is_captured_in_a_cuda_graph(ran):
    selection = on(lists(600, 0, 20), DEVICE)
    low = moved(factors_of(selection), torch.bfloat16, DEVICE)
    leaves = [low.q_BTJI, low.k_BSI, low.weight_BTJ, low.bias_J]

    def step():
        scores = scores_at(low, selection)
        return torch.autograd.grad(scores.nan_to_num(neginf=0).square().sum(), leaves)

    graph, captured = captured_in_a_graph(step)
    assert ran
    with torch.no_grad():
        leaves[0].copy_(torch.randn_like(leaves[0]))
    graph.replay()
    for a, b in zip(captured, step()):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_products_are_more_precise_than_their_operands(dtype):
    import triton_products

    g = torch.Generator().manual_seed(0)
    x = (1e-7 * torch.randn(64, 32, generator=g)).to(DEVICE)
    y, z = (torch.randn(n, 16, generator=g).to(DEVICE, dtype) for n in (32, 64))
    xy, xz = x.new_zeros(64, 16), x.new_zeros(32, 16)
    triton_products.kernel[(1,)](x, y, z, xy, xz)
    for got, expected in ((xy, x.double() @ y.double()), (xz, x.double().T @ z.double())):
        assert (got - expected).norm() < 2e-5 * expected.norm()
