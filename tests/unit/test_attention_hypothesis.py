"""Sparse attention over drawn selections: every implementation is the softmax over the mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from selection_strategies import few, last_queries, lengths, selections, specs
from test_sparse_attention import assert_same, inputs, run

from gsa_kernels.sparse_attention.api import choose, sparse_attention

FEW = 16  # queries


@st.composite
def cases(draw, blocks, tiles, longest):
    """(selection, inputs, options)"""
    spec = draw(specs(blocks, tiles))
    length, batch = draw(lengths(longest)), draw(st.sampled_from((1, 2)))
    selection = draw(selections(spec, batch, length))
    heads = spec.heads * draw(st.sampled_from((1, 2, 3)))
    tensors = inputs(selection, heads, spec.heads, draw(st.sampled_from((8, 16, 24))))
    start = draw(st.sampled_from((0, length // 3, length - 1)))
    if start:
        q, k, v, bias = tensors
        first = start // spec.query_tile
        selection = last_queries(selection, start)
        tensors = (q[:, start:], k, v, bias[:, :, first:])
    options = {"lse": draw(st.booleans()), "with_bias": draw(st.booleans())}
    return selection, tensors, options


@few(60)
@given(cases((1, 3, 8, 16), (1, 7, 16), 100))
def test_eager_is_the_reference(case):
    selection, tensors, options = case
    assert_same(
        run(selection, tensors, **options), run(selection, tensors, "reference", **options)
    )


@few(14)
@given(cases((1, 4, 16, 32), (1, 16, 32), 100))
def test_triton_is_the_reference(case):
    pytest.importorskip("triton")
    from test_triton_attention import DEVICE, check, on_device

    selection, tensors, options = case
    try:
        choose("triton", torch.device(DEVICE), selection.spec, tensors[0].shape[-1])
    except ValueError:
        return  # no kernel of this granularity
    check(selection, tensors, **options)
    if selection.n_queries > FEW:
        return
    # Without gradients a few queries may take another way.
    q, k, v = (x.to(DEVICE, torch.float32) for x in tensors[:3])
    exact = sparse_attention(q, k, v, on_device(selection), impl="reference").out_BTHE
    got = sparse_attention(q, k, v, on_device(selection), impl="triton").out_BTHE
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)
