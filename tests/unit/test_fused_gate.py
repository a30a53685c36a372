"""The output gate inside the kernels of sparse attention against multiplying afterwards."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import make_selection
from test_sparse_attention import inputs
from test_triton_attention import DEVICE, HALF, on_device

from gsa_kernels.sparse_attention.api import sparse_attention

pytest.importorskip("triton")

pytestmark = pytest.mark.kernel

NAMES = ("out", "lse", "dq", "dk", "dv", "dbias", "dgate")
channels = pytest.mark.parametrize("per_head", [True, False], ids=["headwise", "elementwise"])


def gate_for(q, per_head):
    g = torch.Generator().manual_seed(5)
    shape = (*q.shape[:3], 1) if per_head else q.shape
    return torch.randn(shape, generator=g, dtype=torch.float64)  # any sign, as SiLU's


def run(selection, tensors, gate, impl, fused=True, with_bias=True):
    """Outputs and gradients by name; the loss reads the gated output and the log-sum-exp."""
    q, k, v, bias, gate = (x.detach().clone().requires_grad_() for x in (*tensors, gate))
    result = sparse_attention(
        q, k, v, selection, bias_BHQN=bias if with_bias else None,
        gate_BTHE=gate if fused else None, need_lse=True, impl=impl,
    )  # fmt: skip
    out = result.out_BTHE if fused else result.out_BTHE * gate
    loss = out.float().sin().sum() + result.lse_BTH.cos().sum()
    leaves = (q, k, v, bias, gate)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return {n: x.detach() for n, x in zip(NAMES, (out, result.lse_BTH, *grads))}


# One row of each: several documents, a head of padded width, queries with lists of their own, keys
# gathered one by one, fewer keys than the budget, one query.
CASES = [
    ((16, 16), 70, 4, 2, 16, True),
    ((16, 32), 63, 6, 2, 24, False),
    ((16, 1), 40, 4, 4, 16, True),
    ((1, 16), 33, 4, 2, 16, False),
    ((16, 16), 1, 2, 1, 16, False),
]


@channels
@pytest.mark.parametrize(("granularity", "length", "heads", "kv", "width", "docs"), CASES)
def test_a_fused_gate_multiplies_the_output(granularity, length, heads, kv, width, docs, per_head):
    selection = make_selection(length, granularity, window=17, documents=docs)
    tensors = inputs(selection, heads, kv, width)
    gate = gate_for(tensors[0], per_head)
    exact = run(selection, tensors, gate, "reference", fused=False)
    selection = on_device(selection)
    low, gate = [x.to(DEVICE, torch.float32) for x in tensors], gate.to(DEVICE, torch.float32)
    for impl in ("reference", "eager", "triton"):
        got = run(selection, low, gate, impl)
        for name, value in exact.items():
            error = (got[name].cpu().double() - value).norm()
            assert error <= 2e-5 * value.norm() + 1e-5, (impl, name, float(error))


@channels
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_rounds_as_a_multiplication_does(dtype, per_head):
    selection = on_device(make_selection(50, (16, 16), window=9))
    tensors = [x.to(DEVICE, dtype) for x in inputs(selection, width=32)]
    gate = gate_for(tensors[0], per_head).to(DEVICE, dtype)
    got = run(selection, tensors, gate, "triton")
    want = run(selection, tensors, gate, "triton", fused=False)
    equal = ("out", "lse", "dv", *(() if per_head else ("dgate",)))
    for name in equal if DEVICE == "cpu" else ():  # a GPU may order the sums of the two otherwise
        assert torch.equal(got[name], want[name]), name
    exact = run(selection, [x.double() for x in tensors], gate.double(), "reference", fused=False)
    for name, value in exact.items():
        allowed = (want[name].double() - value).norm() + torch.finfo(dtype).eps * value.norm()
        assert (got[name].double() - value).norm() <= 2 * allowed, name


def test_no_result_depends_on_uninitialised_memory(monkeypatch):
    selection = on_device(make_selection(63, (16, 32), documents=True))
    tensors = [x.to(DEVICE, torch.float32) for x in inputs(selection)]
    gate = gate_for(tensors[0], False).to(DEVICE, torch.float32)
    clean = run(selection, tensors, gate, "triton")
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def poisoned(*args, make=make, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        monkeypatch.setattr(torch, name, poisoned)
    dirty = run(selection, tensors, gate, "triton")
    for name, value in clean.items():
        torch.testing.assert_close(dirty[name], value, msg=name)


@channels
def test_the_operators_with_a_gate_are_registered_truthfully(per_head):
    from gsa_kernels.sparse_attention import ops

    selection = on_device(make_selection(40, (16, 16)))
    q, k, v, bias = (x.to(DEVICE, torch.float32).requires_grad_() for x in inputs(selection))
    gate = gate_for(q, per_head).to(DEVICE, torch.float32).requires_grad_()
    spec = selection.spec
    sizes = [spec.key_block, spec.query_tile, spec.window, spec.sinks, 0]
    blocks = selection.blocks_BHQN.contiguous()
    args = (q, k, v, blocks, bias, None, gate, sizes, 0.25, False, True, False)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.forward_operator, args, test_utils=checks)


def test_one_compiled_graph_with_a_gate():
    selection = on_device(make_selection(40, (16, 16)))
    q, k, v, _ = (x.to(DEVICE, torch.float32).requires_grad_() for x in inputs(selection))
    gate = gate_for(q, True).to(DEVICE, torch.float32).requires_grad_()

    def layer(q, k, v, gate):
        gated = sparse_attention(q, k, v, selection, gate_BTHE=gate.sigmoid(), impl="triton")
        return gated.out_BTHE.sin().sum()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(layer(q, k, v, gate), (q, k, v, gate))
    found = torch.autograd.grad(compiled(q, k, v, gate), (q, k, v, gate))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


def test_a_gate_of_another_shape_is_refused():
    selection = make_selection(40, (16, 16))
    q, k, v, _ = inputs(selection)
    with pytest.raises(ValueError, match="an output gate is"):
        sparse_attention(q, k, v, selection, gate_BTHE=q[:, :, :1])
