"""The kernels of the indexer's training signals against PyTorch in float64.

On a machine without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from kernel_cases import captured_in_a_graph, granularity_id, make_documents, make_factors
from test_indexer_loss import PARTS, probabilities
from test_triton_compile import SHARED

from gsa_kernels import dispatch
from gsa_kernels.attention_mass import dense_mass, dense_masses
from gsa_kernels.index_score.api import (
    HierarchicalFactors,
    IndexFactors,
    PooledFactors,
    scores_at,
)
from gsa_kernels.indexer_loss import reference
from gsa_kernels.indexer_loss.api import DISTRIBUTIONS, dense_kl, log_score_bias, selected_kl
from gsa_kernels.select.api import select
from gsa_kernels.selection import SelectionSpec, tile_layout

pytest.importorskip("triton")

pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies bfloat16 matrices as if they were integers.
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
# exp2 of a GPU is good to 2**-22, of which differences of probabilities lose some.
FLOOR = 2e-5 if DEVICE == "cuda" else 4e-6
documents = pytest.mark.parametrize("documents", [False, True], ids=["one_doc", "docs"])
distributions = pytest.mark.parametrize("distribution", DISTRIBUTIONS)


@pytest.fixture
def kernels(monkeypatch):
    """Take the kernels wherever tensors are on DEVICE, also where that is a CPU."""

    def run(call):
        with monkeypatch.context() as patch:
            if DEVICE == "cpu":
                patch.setattr(dispatch, "_triton_reason", lambda *_: "")
            return call()

    return run


def moved(factors, dtype, device="cpu"):
    """The factors as leaves; the bias stays in float32 at least, as a parameter does."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return replace(
        factors,
        **{
            n: getattr(factors, n).to(device, wide if n == "bias_J" else dtype).requires_grad_()
            for n in PARTS
        },
    )


def rounded(factors, dtype):
    """float64 factors whose numbers `dtype` has."""
    return replace(factors, **{n: getattr(factors, n).to(dtype).double() for n in PARTS})


def values(call, factors):
    """The result of call(factors) and the gradients of its finite entries, by name."""
    out = call(factors)
    finite = out.masked_fill(out.isinf(), 0)
    g = torch.Generator().manual_seed(5)
    seed = torch.randn(out.shape, generator=g, dtype=torch.float64)
    grads = torch.autograd.grad(
        finite, [getattr(factors, n) for n in PARTS], seed.to(out.device, finite.dtype)
    )
    return {n: x.detach() for n, x in zip(("out", *PARTS), [out, *grads])}


def check(kernels, call, factors, dtype=torch.float32):
    """Error of the kernels <= 2 x that of PyTorch in the same precision, plus a rounding."""
    factors = rounded(factors, dtype)
    exact = values(call, moved(factors, torch.float64))
    low = values(call, moved(factors, dtype))
    got = kernels(lambda: values(call, moved(factors, dtype, DEVICE)))
    for name, value in exact.items():
        found = got[name].cpu()
        assert found.dtype == low[name].dtype, name
        assert torch.equal(found.isinf(), value.isinf()) and not found.isnan().any(), name
        finite = ~value.isinf()
        error = (found.double() - value)[finite].norm()
        allowed = (low[name].double() - value)[finite].norm()
        floor = FLOOR * value[finite].norm() + 1e-7
        assert error <= 2 * allowed + floor, (name, float(error), float(allowed))


def place(x):
    return None if x is None else x.to(DEVICE)


def make_case(length, granularity, heads=1, documents=False, window=7, **kwargs):
    factors = make_factors(length, heads=heads, seed=3, **kwargs)
    spec = SelectionSpec(*granularity, window=window, sinks=3, heads=heads)
    g = torch.Generator().manual_seed(4)
    q = torch.randn(2, length, 4, 24, generator=g, dtype=torch.float64)
    k = torch.randn(2, length, 2, 24, generator=g, dtype=torch.float64)
    return factors, spec, make_documents(length) if documents else None, q, k


def on(selection, device):
    docs = selection.doc_start_BS
    return replace(
        selection,
        blocks_BHQN=selection.blocks_BHQN.to(device),
        doc_start_BS=None if docs is None else docs.to(device),
    )


# (C, R, length): single keys, blocks, several parts of a tile and ranges of keys, C that divides
# no step, one token.
MASS = [(1, 1, 63), (16, 16, 100), (64, 48, 600), (5, 7, 63), (16, 16, 1)]


@pytest.mark.parametrize("case", MASS, ids=str)
@documents
@pytest.mark.parametrize("heads", [1, 2])
def test_dense_masses(kernels, case, documents, heads):
    c, r, length = case
    _, spec, docs, q, k = make_case(length, (c, r), heads, documents)
    n = -(-length // r)
    check_masses(kernels, q, k, spec, sorted({0, n // 2, n - 1}), 0, docs, torch.float32)


@pytest.mark.parametrize("start", [0, 37])
def test_dense_masses_of_the_last_queries_in_half_precision(kernels, start):
    _, spec, docs, q, k = make_case(150, (16, 32), 2, True)
    check_masses(kernels, q[:, start:], k, spec, [0, 2, 3], start, docs, HALF)


def check_masses(kernels, q, k, spec, tiles, start, docs, dtype):
    q, k = q.to(dtype), k.to(dtype)
    layout = tile_layout(spec, q.shape[1], k.shape[1], start, docs)
    numbers = torch.tensor(tiles, device=DEVICE)
    got = kernels(
        lambda: dense_masses(
            q.to(DEVICE), k.to(DEVICE), spec, numbers, start, place(docs), spec.heads
        )
    ).cpu()
    assert got.shape == (2, spec.heads, len(tiles), layout.n_blocks)
    for i, tile in enumerate(tiles):
        exact, low = (
            dense_mass(q.to(t), k.to(t), layout, tile, docs, spec.heads)
            for t in (torch.float64, torch.float32)
        )
        reach = exact.shape[-1]
        assert not got[:, :, i, reach:].any()
        error = (got[:, :, i, :reach] - exact).norm()
        assert error <= 2 * (low - exact).norm() + FLOOR * exact.norm()


def test_dense_mass_of_one_tile_takes_the_kernel(kernels):
    _, spec, docs, q, k = make_case(63, (8, 16), 2, True)
    q, k = q.float(), k.float()
    expected = dense_mass(q, k, tile_layout(spec, 63, 63, 0, docs), 2, docs, 2)
    layout = tile_layout(spec, 63, 63, 0, place(docs), DEVICE)
    moved_q, moved_k = q.to(DEVICE), k.to(DEVICE)
    got = kernels(lambda: dense_mass(moved_q, moved_k, layout, 2, place(docs), 2))
    torch.testing.assert_close(got.cpu(), expected)


# (C, R, length, budget)
LISTS = [(1, 1, 34, 25), (8, 1, 34, 28), (16, 16, 100, 90), (4, 12, 63, 60), (4, 16, 1, 20)]


@pytest.mark.parametrize("case", LISTS, ids=str)
@pytest.mark.parametrize(
    ("documents", "heads", "activation"), [(False, 1, "sigmoid"), (True, 2, "relu")]
)
def test_scores_of_listed_blocks(kernels, case, documents, heads, activation):
    c, r, length, budget = case
    factors, spec, docs, _, _ = make_case(length, (c, r), heads, documents, activation=activation)
    selection = select(factors, spec, budget, budget, length, docs).selection

    def call(f):
        return scores_at(f, on(selection, f.k_BSI.device))

    if selection.blocks_BHQN.shape[-1]:
        check(kernels, call, factors)
    else:
        assert kernels(lambda: call(moved(factors, torch.float32, DEVICE))).numel() == 0


@pytest.mark.parametrize(("index_heads", "width"), [(1, 32), (6, 24), (64, 128)])
@pytest.mark.parametrize("granularity", [(1, 16), (16, 16)], ids=granularity_id)
def test_scores_of_half_precision(kernels, granularity, index_heads, width):
    # One key per block: both operands of 16 bits. Mean keys of documents are float32.
    factors, spec, _, _, _ = make_case(63, granularity, index_heads=index_heads, width=width)
    selection = select(factors, spec, 60, 60, 63).selection

    def call(f):
        return scores_at(f, on(selection, f.k_BSI.device))

    check(kernels, call, replace(factors, scale=width**-0.5), HALF)


@pytest.mark.parametrize("case", [(1, 1, 63), (16, 16, 100), (5, 7, 63)], ids=str)
@documents
@distributions
def test_dense_kl(kernels, case, documents, distribution):
    c, r, length = case
    heads = 2 if documents else 1
    factors, spec, docs, q, k = make_case(length, (c, r), heads, documents)
    n = -(-length // r)
    tiles = torch.tensor([0, n // 2, n - 2, n - 1])

    def call(f):
        device, dtype = f.k_BSI.device, f.k_BSI.dtype
        moved_docs = None if docs is None else docs.to(device)
        return dense_kl(
            f, q.to(device, dtype), k.to(device, dtype), spec, tiles, moved_docs, distribution
        )

    check(kernels, call, factors)


@pytest.mark.parametrize("kind", ["max", "pooled"])
def test_dense_kl_of_scores_that_have_no_kernel(kernels, kind, monkeypatch):
    factors, spec, docs, q, k = make_case(100, (8, 16), 2, True, block_score="max")
    if kind == "pooled":
        parts = {x.name: getattr(factors, x.name) for x in fields(IndexFactors)}
        factors = PooledFactors(**parts, pool=16)
    assert factors.no_kernel(8)
    tiles = torch.tensor([3, 5, 6])
    from gsa_kernels.indexer_loss import api

    monkeypatch.setitem(api._CHUNK, DEVICE, 1000)  # in several pieces

    def call(f):
        device, dtype = f.k_BSI.device, f.k_BSI.dtype
        return dense_kl(
            f, q.to(device, dtype), k.to(device, dtype), spec, tiles, docs.to(device), "log"
        )

    check(kernels, call, factors)


@distributions
@pytest.mark.parametrize("granularity", [(4, 2), (8, 16)], ids=granularity_id)
def test_selected_kl_is_the_reference(kernels, granularity, distribution):
    factors, spec, docs, q, k = make_case(63, granularity, 2, True)
    selection = select(factors, spec, 50, 50, 63, docs).selection
    mask = selection.to_dense_mask()
    p = probabilities(q, k, mask)
    layout, c = selection.layout, spec.key_block
    mass = torch.zeros(selection.blocks_BHQN.shape, dtype=torch.float64)
    for i in range(layout.n_tiles):
        rows = (
            p.unflatten(1, (2, -1))
            .mean(2)[:, :, i * spec.query_tile :][:, :, : spec.query_tile]
            .mean(2)
        )
        rows = torch.nn.functional.pad(rows, (0, -63 % c)).unflatten(-1, (-1, c)).sum(-1)
        mass[:, :, i] = rows.gather(-1, selection.blocks_BHQN[:, :, i].long().clamp_min(0))
    mass = mass.masked_fill(selection.blocks_BHQN < 0, 3.0)  # never to be read
    lists = [
        [[[j for j in row if j >= 0] for row in tiles] for tiles in per_head]
        for per_head in selection.blocks_BHQN.tolist()
    ]

    def call(f):
        if f.k_BSI.dtype == torch.float64:
            return reference.kl(f, p, spec, lists, docs, distribution)
        device = f.k_BSI.device
        return selected_kl(f, on(selection, device), mass.to(device), distribution)

    check(kernels, call, factors)


@distributions
def test_equal_scores_and_rows_without_attention(kernels, distribution):
    factors, spec, _, _, _ = make_case(63, (4, 16))
    factors = replace(
        factors,
        q_BTJI=torch.zeros_like(factors.q_BTJI),
        bias_J=torch.tensor([-50.0, 60.0, 0.0, 200.0], dtype=torch.float64),
    )
    selection = select(factors, spec, 40, 40, 63).selection
    g = torch.Generator().manual_seed(0)
    mass = torch.rand(selection.blocks_BHQN.shape, generator=g, dtype=torch.float64)
    mass[:, :, -1] = 0

    def call(f):
        device = f.k_BSI.device
        return selected_kl(f, on(selection, device), mass.to(device, f.k_BSI.dtype), distribution)

    check(kernels, call, factors)


def test_relu_scores_below_zero_get_no_gradient(kernels):
    factors, spec, _, _, _ = make_case(63, (4, 16), activation="relu")
    factors = replace(factors, weight_BTJ=factors.weight_BTJ - 0.5)
    selection = select(factors, spec, 40, 40, 63).selection
    mass = torch.rand(selection.blocks_BHQN.shape, dtype=torch.float64)
    for signal in (
        lambda f, s: selected_kl(f, s, mass.to(f.k_BSI.device, f.k_BSI.dtype), "log"),
        lambda f, s: log_score_bias(f, s, 0.1),
    ):
        check(kernels, lambda f, s=signal: s(f, on(selection, f.k_BSI.device)), factors)


def test_one_program_walks_a_long_list(kernels, monkeypatch):
    from gsa_kernels.index_score import at_launch
    from gsa_kernels.indexer_loss import triton_launch

    monkeypatch.setattr(at_launch, "PROGRAMS", 12)
    monkeypatch.setattr(triton_launch, "LONGEST", 16)
    factors, spec, docs, q, k = make_case(100, (1, 16), 2, True)
    tiles = torch.tensor([1, 4, 6])

    def call(f):
        device, dtype = f.k_BSI.device, f.k_BSI.dtype
        return dense_kl(
            f, q.to(device, dtype), k.to(device, dtype), spec, tiles, docs.to(device), "log"
        )

    check(kernels, call, factors)


def test_no_tile_with_candidates_is_no_loss(kernels):
    factors, spec, _, q, k = make_case(63, (8, 16))
    low = moved(factors, torch.float32, DEVICE)
    q, k = q.to(DEVICE, torch.float32), k.to(DEVICE, torch.float32)
    for wide, tiles in ((spec, [0]), (replace(spec, window=63), [0, 3]), (spec, [])):
        loss = kernels(
            lambda w=wide, t=tiles: dense_kl(low, q, k, w, torch.tensor(t, dtype=torch.long))
        )
        assert float(loss) == 0
    one = replace(spec, key_block=64)
    assert float(kernels(lambda: dense_kl(low, q, k, one, torch.tensor([3])))) == 0


def test_a_subclass_that_keeps_the_formula_takes_the_kernels(kernels):
    factors = moved(make_factors(20), torch.float32, DEVICE)
    parts = {x.name: getattr(factors, x.name) for x in fields(IndexFactors)}
    fine = HierarchicalFactors(**parts, pool=4, survivors=2)
    assert kernels(lambda: fine.no_kernel(4)) == ""
    assert "formula of its own" in PooledFactors(**parts, pool=4).no_kernel(4)
    assert "float32 at most" in moved(make_factors(20), torch.float64).no_kernel(4)


def test_deterministic_algorithms_add_nothing_up_atomically():
    factors = moved(make_factors(20), torch.float32, DEVICE)
    torch.use_deterministic_algorithms(True)
    try:
        assert "atomically" in factors.no_kernel(4)
    finally:
        torch.use_deterministic_algorithms(False)


def objective(low, selection, mass, q, k, docs):
    tiles = torch.arange(1, 4, 2, device=DEVICE)  # made on the device: a graph cannot copy
    return selected_kl(low, selection, mass, "log") + dense_kl(
        low, q, k, selection.spec, tiles, docs, "log"
    )


def small_objective(granularity=(8, 16)):
    factors, spec, docs, q, k = make_case(63, granularity, 2, True)
    selection = on(select(factors, spec, 50, 50, 63, docs).selection, DEVICE)
    low = moved(factors, torch.float32, DEVICE)
    mass = torch.rand(selection.blocks_BHQN.shape, device=DEVICE)
    q, k = (x.to(DEVICE, torch.float32) for x in (q, k))
    return low, selection, mass, q, k, docs.to(DEVICE)


def test_no_result_depends_on_uninitialised_memory(kernels, monkeypatch):
    case = small_objective()
    leaves = [getattr(case[0], n) for n in PARTS]

    def run():
        loss = objective(*case)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    clean = kernels(run)
    made = []

    def poisoned(make):
        def call(*args, **kwargs):
            made.append(make(*args, **kwargs))
            return made[-1].fill_(torch.nan) if made[-1].is_floating_point() else made[-1]

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for dirty, value in zip(kernels(run), clean):
        torch.testing.assert_close(dirty, value)
    assert len(made) > 8


def test_operators_are_registered_truthfully():
    from gsa_kernels.index_score.at_ops import listed_scores_operator as listed_scores
    from gsa_kernels.indexer_loss import ops

    low, selection, mass, q, k, docs = small_objective()
    blocks, tiles = selection.blocks_BHQN.contiguous(), torch.tensor([1, 3], device=DEVICE)
    keys = low.k_BSI[:, :7].detach().contiguous().requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")

    def check_op(op, *args):
        torch.library.opcheck(op, args, test_utils=checks)

    parts = (low.q_BTJI, keys, low.weight_BTJ, low.bias_J)
    check_op(listed_scores, *parts, blocks, None, 16, 0.3, True)
    check_op(listed_scores, *parts[:3], None, blocks[:, :, :2].contiguous(), tiles, 16, 0.3, False)
    check_op(ops.mean_kl_operator, mass.requires_grad_(), mass.detach(), True, 1e-6)
    check_op(ops.block_mass_operator, q, k, tiles, docs, [8, 16, 0, 2])
    check_op(ops.candidate_blocks_operator, tiles, docs, 2, 63, [8, 16, 7, 3, 0, 2])


def test_one_compiled_graph(kernels):
    low, *case = small_objective()

    def layer(parts):
        return objective(replace(low, **{n: x * 2 for n, x in zip(PARTS, parts)}), *case)

    parts = [getattr(low, n) for n in PARTS]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = kernels(lambda: torch.autograd.grad(layer(parts), parts))
    found = kernels(lambda: torch.autograd.grad(compiled(parts), parts))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


def test_candidates_are_those_of_the_layout(kernels):
    from gsa_kernels.indexer_loss import ops

    for sinks, documents in ((0, False), (0, True), (9, True), (9, False)):
        spec = SelectionSpec(4, 12, window=10, sinks=sinks)
        docs = make_documents(100) if documents else None
        layout = tile_layout(spec, 100, 100, 0, docs)
        tiles = torch.arange(layout.n_tiles)
        got = ops.candidate_blocks(
            tiles.to(DEVICE), place(docs), 2, 100, [4, 12, 10, sinks, 0, 1]
        ).cpu()
        allowed = layout.candidates(slice(None), 25)[:, None].expand(2, -1, -1, -1)
        expected = torch.where(allowed, torch.arange(25), -1)
        assert torch.equal(got, expected.int())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_the_objective_is_captured_in_a_cuda_graph():
    """No part of it waits for the device."""
    case = small_objective()
    leaves = [getattr(case[0], n) for n in PARTS]

    def step():
        return torch.autograd.grad(objective(*case), leaves)

    graph, captured = captured_in_a_graph(step)
    with torch.no_grad():
        leaves[0].copy_(torch.randn_like(leaves[0]))
    graph.replay()
    for a, b in zip(captured, step()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


SHAPES = [  # target, then C, R, T, H, K, E, dtype
    ("sm_90", "64 64 131072 16 4 128 bfloat16"),
    ("sm_80", "64 1 131072 16 4 128 bfloat16"),
    *((target, "1 1 131072 16 4 128 bfloat16") for target in SHARED),
]


@pytest.mark.parametrize(("target", "shape"), SHAPES)
def test_launches_compile_within_limits(target, shape):
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = Path(__file__).parent / "aot_objective.py"
    done = subprocess.run(
        [sys.executable, str(program), target, *shape.split()],
        capture_output=True,
        text=True,
        env=environ,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    unions = {"mark_kernel", "sweep_kernel", "union_gradient_kernel"}
    found = unions & {row["kernel"] for row in rows}
    assert found == (unions if shape.startswith("1 1 ") else set())
    assert len(rows) - len(found) == 10 - (found == unions)
    for row in rows:
        assert row["shared"] <= SHARED[target] and row["local"] <= 64, row
