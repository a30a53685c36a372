"""xformers' block-sparse tensor over a Selection equals the reference of sparse attention."""

from __future__ import annotations

import pytest
import torch
from attention_cases import DIMS, draw
from kernel_cases import make_selection

pytest.importorskip("xformers")

from gsa_kernels.sparse_attention.api import sparse_attention
from gsa_platform.contracts import Sequence
from gsa_platform.errors import UserError
from gsa_platform.validate import validate
from gsa_plugins.attention import xformers_sparse
from gsa_plugins.attention.xformers_sparse import (
    XformersSparseAttention,
    block_sparse_attention,
    cell_size,
)
from gsa_plugins.configs import XformersSparseConfig
from gsa_plugins.dense import dense_attention

EXACT = [(16, 16), (32, 16), (16, 32), (48, 16), (32, 64)]
granularities = pytest.mark.parametrize("granularity", EXACT, ids=lambda g: f"C{g[0]}R{g[1]}")
documents = pytest.mark.parametrize("documents", [False, True], ids=["one_doc", "docs"])
NAMES = ("out", "mass", "dq", "dk", "dv", "dbias")


def inputs(selection, heads=4, kv_heads=2):
    g = torch.Generator().manual_seed(1)
    q, k, v = draw(selection.n_queries, selection.n_keys, heads=heads, kv_heads=kv_heads)
    return [q, k, v, torch.randn(selection.blocks_BHQN.shape, generator=g, dtype=q.dtype)]


def reference(q, k, v, selection, bias):
    result = sparse_attention(q, k, v, selection, bias_BHQN=bias, need_mass=True, impl="reference")
    return result.out_BTHE, result.mass_BHQN


def run(attend, selection, tensors, with_bias=True):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out, mass = attend(*leaves[:3], selection, leaves[3] if with_bias else None)
    assert not mass.requires_grad
    used = leaves if with_bias else leaves[:3]
    grads = torch.autograd.grad(out.double().sin().sum(), used, materialize_grads=True)
    return {n: x.detach() for n, x in zip(NAMES, [out, mass, *grads])}


def moved(selection, device):
    docs = selection.doc_start_BS
    return type(selection)(
        selection.spec,
        selection.blocks_BHQN.to(device),
        selection.n_queries,
        selection.n_keys,
        selection.q_start,
        None if docs is None else docs.to(device),
    )


def assert_same(selection, tensors, device="cpu", **kwargs):
    expected = run(reference, selection, tensors, **kwargs)
    tensors = [x.to(device) for x in tensors]
    got = run(block_sparse_attention, moved(selection, device), tensors, **kwargs)
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name].cpu(), value, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@granularities
@pytest.mark.parametrize("length", [1, 63, 100])
@pytest.mark.parametrize("heads", [1, 2], ids=["shared", "kv"])
@documents
def test_it_is_the_reference(granularity, length, heads, documents, device):
    selection = make_selection(
        length, granularity, heads=heads, documents=documents, budget=80, window=20
    )
    assert_same(selection, inputs(selection), device)


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (1, 20), (16, 1), (40, 17), (200, 0)])
@documents
def test_windows_and_sinks(window, sinks, documents):
    selection = make_selection(
        100, (16, 16), window=window, sinks=sinks, budget=90, documents=documents
    )
    assert_same(selection, inputs(selection), with_bias=False)


@granularities
@pytest.mark.parametrize("start", [1, 16, 37, 99])
@documents
def test_queries_that_continue_a_cache(granularity, start, documents):
    whole = make_selection(100, granularity, documents=documents, budget=80)
    selection = whole.rows(start, 100)
    assert_same(selection, inputs(selection))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (8, 1)])
def test_grouped_heads(heads, kv_heads):
    for choices in {1, kv_heads}:
        selection = make_selection(100, (16, 16), heads=choices)
        assert_same(selection, inputs(selection, heads, kv_heads))


def test_a_head_at_a_time(monkeypatch):
    selection = make_selection(100, (16, 16), heads=2, documents=True)
    monkeypatch.setitem(xformers_sparse._CHUNK, "cpu", 1)
    assert_same(selection, inputs(selection))


def test_logits_far_apart():
    # xformers' softmax alone clamps rows that lie 55 below the largest of the whole tensor.
    selection = make_selection(100, (16, 16))
    q, k, v, bias = inputs(selection)
    q = q * torch.linspace(-40, 40, 100, dtype=q.dtype)[None, :, None, None]
    assert_same(selection, [q, k, v, bias])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision(dtype, device):
    selection = make_selection(130, (16, 32))
    low = [x.to(dtype) for x in inputs(selection)]
    exact = run(reference, selection, [x.double() for x in low])
    allowed = run(reference, selection, low)
    got = run(block_sparse_attention, moved(selection, device), [x.to(device) for x in low])
    assert got["out"].dtype == dtype and got["dk"].dtype == dtype
    for name, value in exact.items():
        budget = 2 * (allowed[name].double() - value).norm()
        budget += torch.finfo(torch.float32).eps * value.norm()
        assert (got[name].double().cpu() - value).norm() <= budget, name


@documents
def test_later_tokens_change_nothing(documents):
    selection = make_selection(100, (16, 16), documents=documents)
    q, k, v, _ = inputs(selection)
    before, _ = block_sparse_attention(q, k, v, selection)
    for t in (1, 17, 48, 99):
        others = [x.clone() for x in (q, k, v)]
        for x in others:
            x[:, t:] += 1
        after, _ = block_sparse_attention(*others, selection)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-12)
        assert not torch.equal(after[:, t:], before[:, t:])


def test_autocast_changes_nothing():
    selection = make_selection(100, (16, 16))
    q, k, v = (x.bfloat16().requires_grad_() for x in draw(100))
    layer = XformersSparseAttention(XformersSparseConfig(key_block=16, query_tile=16), DIMS)
    outs = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = layer(q, k, v, selection, Sequence()).out_BTHE
        outs.append([out, *torch.autograd.grad(out.float().sin().sum(), (q, k, v))])
    for plain, cast in zip(*outs):
        assert torch.equal(plain, cast)


def test_without_a_selection_it_is_dense():
    layer = XformersSparseAttention(XformersSparseConfig(), DIMS)
    q, k, v = draw(63)
    assert torch.equal(
        layer(q, k, v, None, Sequence()).out_BTHE, dense_attention(q, k, v, Sequence())
    )
    assert "cells of 64 x 64" in layer.describe("cpu")


@pytest.mark.parametrize(("key_block", "query_tile"), [(1, 16), (8, 64), (1, 1), (64, 1)])
def test_cells_that_would_not_be_exact_are_refused(key_block, query_tile):
    with pytest.raises(ValueError, match=r"squar.* that divide C and R.*attention\.mode=tile"):
        cell_size(key_block, query_tile)
    selection = make_selection(63, (key_block, query_tile))
    with pytest.raises(ValueError, match="divide C and R"):
        block_sparse_attention(*inputs(selection)[:3], selection)


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        ("attention.key_block=8", ["key_block=8", "at least 16", "attention=gsa"]),
        ("attention.mode=block", ["attention.mode=block", "Only attention.mode=tile"]),
    ],
)
def test_refusals_before_training(typed, parts):
    from gsa_platform import compose  # Hydra, which a GPU machine may lack

    cfg = compose.load(["experiment=smoke", "attention=xformers_sparse", typed])
    with pytest.raises(UserError) as caught:
        validate(cfg)
    for part in parts:
        assert part in str(caught.value)
