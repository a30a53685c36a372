"""Decoding: a few queries whose keys are split over programs, against the reference."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import captured_in_a_graph, granularity_id, make_selection
from test_fused_gate import gate_for
from test_sparse_attention import inputs
from test_triton_attention import DEVICE, HALF, on_device

from gsa_kernels.selection import Selection
from gsa_kernels.sparse_attention.api import sparse_attention

pytest.importorskip("triton")

pytestmark = pytest.mark.kernel


def last(whole, start, tensors):
    """The selection and q, k, v, bias of the queries from `start` on."""
    first = start // whole.spec.query_tile
    length, docs = whole.n_queries, whole.doc_start_BS
    blocks = whole.blocks_BHQN[:, :, first:].contiguous()
    part = Selection(whole.spec, blocks, length - start, length, start, docs)
    q, k, v, bias = tensors
    return part, (q[:, start:], k, v, bias[:, :, first:])


def decode(selection, tensors, gate=None, scale=0.3):
    from gsa_kernels.sparse_attention import triton_decode

    q, k, v, bias = tensors
    docs = selection.doc_start_BS
    docs = None if docs is None else docs.to(torch.int32)
    bias = None if bias is None else bias.float()
    return triton_decode.decode(q, k, v, selection, bias, docs, gate, scale)


# C, R, length, first query, heads, key-value heads, choices, width, documents
CASES = [
    (1, 1, 100, 99, 4, 2, 1, 16, False),
    (1, 1, 63, 61, 4, 2, 2, 16, True),
    (16, 1, 100, 97, 6, 2, 2, 24, True),
    (4, 1, 100, 97, 4, 2, 1, 16, True),
    (1, 16, 63, 60, 4, 4, 4, 16, False),
    (5, 7, 100, 94, 4, 2, 1, 16, True),
    (16, 16, 130, 126, 16, 2, 1, 16, True),  # inside a tile and across its border
    (64, 64, 300, 299, 4, 1, 1, 32, False),
    (16, 16, 1, 0, 2, 1, 1, 16, False),
    (8, 32, 12, 0, 2, 2, 2, 16, True),  # fewer keys than the budget
]


@pytest.mark.parametrize(
    ("c", "r", "length", "start", "heads", "kv", "choices", "width", "docs"), CASES
)
def test_decoding_is_the_reference(c, r, length, start, heads, kv, choices, width, docs):
    whole = make_selection(length, (c, r), budget=70, heads=choices, documents=docs)
    part, (q, k, v, bias) = last(whole, start, inputs(whole, heads, kv, width))
    gate = gate_for(q, per_head=docs)
    kwargs = dict(bias_BHQN=bias, gate_BTHE=gate, scale=0.3, need_lse=True, impl="reference")
    exact = sparse_attention(q, k, v, part, **kwargs)
    low = [x.to(DEVICE, torch.float32).contiguous() for x in (q, k, v, bias, gate)]
    out, lse = decode(on_device(part), low[:4], low[4])
    torch.testing.assert_close(out.cpu().double(), exact.out_BTHE, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        lse.cpu().double().transpose(1, 2), exact.lse_BTH, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision(dtype):
    whole = make_selection(300, (16, 16), budget=200)
    part, tensors = last(whole, 295, [x.to(dtype) for x in inputs(whole, width=64)])
    low = [x.to(DEVICE).contiguous() for x in tensors]
    part = on_device(part)
    exact = sparse_attention(*(x.double() for x in low[:3]), part, impl="reference").out_BTHE
    reference = sparse_attention(*low[:3], part, impl="reference").out_BTHE
    got = sparse_attention(*low[:3], part, impl="triton").out_BTHE
    allowed = 2 * (reference.double() - exact).norm() + 1e-3 * exact.norm()
    assert got.dtype == dtype and (got.double() - exact).norm() <= allowed


def test_a_sequence_decodes_alike_whatever_else_is_in_the_batch():
    whole = make_selection(130, (16, 16), budget=100, documents=True)
    part, tensors = last(whole, 127, inputs(whole))
    q, k, v, bias = (x.to(DEVICE, torch.float32).contiguous() for x in tensors)
    k[1] = k[1, :1]  # all of the second sequence's scores are equal
    together = decode(on_device(part), (q, k, v, bias))
    for i in (0, 1):
        docs = part.doc_start_BS[i : i + 1]
        alone = Selection(part.spec, part.blocks_BHQN[i : i + 1], 3, 130, 127, docs)
        own = decode(on_device(alone), [x[i : i + 1].contiguous() for x in (q, k, v, bias)])
        for a, b in zip(own, together):
            assert torch.equal(a[0], b[i])


def test_keys_may_lie_in_longer_buffers_and_what_follows_is_not_read():
    whole = make_selection(100, (16, 16), budget=70)
    part, tensors = last(whole, 99, inputs(whole))
    part = on_device(part)
    q, k, v, bias = (x.to(DEVICE, torch.float32).contiguous() for x in tensors)
    want = decode(part, (q, k, v, bias))
    longer = [torch.full((2, 150, *x.shape[2:]), torch.nan, device=DEVICE) for x in (k, v)]
    for x, y in zip(longer, (k, v)):
        x[:, :100] = y
    got = decode(part, (q, *(x[:, :100] for x in longer), bias))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_it_is_taken_where_no_gradient_is_wanted(monkeypatch):
    from gsa_kernels.sparse_attention import ops

    taken, make = [], ops.decode
    monkeypatch.setattr(ops, "decode", lambda *args: taken.append(1) or make(*args))
    whole = make_selection(63, (16, 16))
    part, tensors = last(whole, 60, inputs(whole))
    part = on_device(part)
    q, k, v, _ = (x.to(DEVICE, torch.float32).contiguous() for x in tensors)
    few = sparse_attention(q, k, v, part, need_lse=True, impl="triton")
    assert taken == [1] and few.mass_BHQN is None
    learning = sparse_attention(q.requires_grad_(), k, v, part, need_lse=True, impl="triton")
    assert taken == [1] and learning.out_BTHE.requires_grad
    torch.testing.assert_close(few.out_BTHE, learning.out_BTHE.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(few.lse_BTH, learning.lse_BTH.detach(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        sparse_attention(q, k, v, part, impl="triton")
        assert taken == [1, 1]
        assert sparse_attention(q, k, v, part, need_mass=True, impl="triton").mass_BHQN is not None
    assert taken == [1, 1]


def test_the_operator_is_registered_truthfully_and_compiles(monkeypatch):
    from gsa_kernels.sparse_attention import ops

    for name in ("empty", "empty_like"):  # and nothing of uninitialised memory shows
        make = getattr(torch, name)

        def poisoned(*args, make=make, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        monkeypatch.setattr(torch, name, poisoned)
    whole = make_selection(63, (16, 16))
    part, tensors = last(whole, 60, inputs(whole))
    part = on_device(part)
    q, k, v, bias = (x.to(DEVICE, torch.float32).contiguous() for x in tensors)
    spec = part.spec
    sizes = [spec.key_block, spec.query_tile, spec.window, spec.sinks, part.q_start]
    args = (q, k, v, part.blocks_BHQN, bias, None, q, sizes, 0.25)
    torch.library.opcheck(ops.decode_operator, args, test_utils=("test_schema", "test_faketensor"))
    monkeypatch.undo()

    def call(q, k, v):
        return sparse_attention(q * 2, k, v, part, impl="triton").out_BTHE.sin()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, k, v), call(q, k, v))


def test_a_model_decodes_to_what_one_forward_gives():
    from gsa_platform.testing.case import Case

    impl = "triton" if DEVICE == "cpu" else "auto"  # a case is built on the CPU
    case = Case("attention", "gsa", {"impl": impl}, ("gate=output",), mode="tile")
    ends = [30, 31, 32, 36]  # inside tiles and across their borders
    model = case.model("model.n_layers=1").float().eval().to(DEVICE)
    text = case.text()[:, : ends[-1]].to(DEVICE)
    with torch.no_grad():
        whole, cache = model(text).hidden_BTD, model.new_cache()
        pieces = [model(text[:, a:b], cache=cache).hidden_BTD for a, b in zip([0, *ends], ends)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("granularity", [(64, 64), (32, 1), (1, 1)], ids=granularity_id)
@pytest.mark.parametrize("queries", [1, 16])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_sizes_of_a_real_model(granularity, queries, dtype):
    sizes = dict(window=128, sinks=64, budget=2048, documents=queries == 16)
    whole = make_selection(3000, granularity, **sizes)
    part, tensors = last(whole, 3000 - queries, inputs(whole, 16, 4, 128))
    part = on_device(part)
    low = [x.to(DEVICE, dtype).contiguous() for x in tensors]
    gate = gate_for(low[0], per_head=False).to(DEVICE, dtype)
    exact = sparse_attention(*(x.double() for x in low[:3]), part, gate_BTHE=gate.double(),
                             scale=0.3, impl="eager").out_BTHE  # fmt: skip
    got, _ = decode(part, (*low[:3], None), gate)
    error = (got.double() - exact).norm() / exact.norm()
    assert error <= 4 * torch.finfo(dtype).eps, float(error)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_captured_in_a_cuda_graph():
    whole = make_selection(300, (16, 16), budget=150)
    part, tensors = last(whole, 299, inputs(whole))
    part = on_device(part)
    q, k, v, _ = (x.to(DEVICE, torch.float16).contiguous() for x in tensors)

    def step():
        return sparse_attention(q, k, v, part, impl="triton").out_BTHE

    graph, captured = captured_in_a_graph(step)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(captured, step())
