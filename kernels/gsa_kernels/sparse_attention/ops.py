"""torch.library operators over the Triton kernels, so that torch.compile, checkpointing and CUDA
graphs see one opaque call each. Imports no triton until an operator runs.
"""

from functools import lru_cache, partial

import torch
from torch import Tensor

from gsa_kernels.dispatch import differentiable, undispatched
from gsa_kernels.selection import Selection, SelectionSpec

_spec = lru_cache(SelectionSpec)  # it counts its local slots once


def _selection(
    blocks: Tensor, docs: Tensor | None, sizes: list[int], queries: int, keys: int
) -> Selection:
    c, r, window, sinks, q_start = sizes
    spec = _spec(c, r, window, sinks, blocks.shape[1])
    return Selection(spec, blocks, queries, keys, q_start, docs)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    bias: Tensor | None,
    docs: Tensor | None,
    gate: Tensor | None,
    sizes: list[int],
    scale: float,
    need_mass: bool,
    keep: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out [B, T, H, E], lse [B, H, T], mass [B, Hs, Q, N] or empty, ungated out or empty, its
    residual [B, T, H, E] int8 or empty).

    sizes: C, R, window, sinks, q_start. docs: int32. gate: [B, T, H, E or 1], multiplies out.
    keep: a backward will follow, which needs the last two. All contiguous.
    """
    from . import triton_launch

    selection = _selection(blocks, docs, sizes, q.shape[1], k.shape[1])
    *found, residual = triton_launch.forward(
        q, k, v, selection, bias, docs, scale, need_mass, gate, keep
    )
    return *found, residual if keep else residual.new_empty(0)  # type: ignore[return-value]


forward_operator = torch.library.custom_op("gsa::sparse_attention", _forward, mutates_args=())


@forward_operator.register_fake
def _(q, k, v, blocks, bias, docs, gate, sizes, scale, need_mass, keep, deterministic):  # type: ignore[no-untyped-def]
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    mass = q.new_empty(blocks.shape if need_mass else (0,), dtype=torch.float32)
    ungated = torch.empty_like(q) if keep and gate is not None else q.new_empty(0)
    kept = keep and q.dtype in (torch.float16, torch.bfloat16)
    residual = q.new_empty(q.shape if kept else (0,), dtype=torch.int8)
    return torch.empty_like(q), lse, mass, ungated, residual


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    residual: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    blocks: Tensor,
    bias: Tensor | None,
    docs: Tensor | None,
    gate: Tensor | None,
    sizes: list[int],
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dbias, dgate); dbias is empty without a bias, dgate without a gate.

    out and residual (or an empty one) are the ungated output, dout the gradient of the gated one.
    """
    from . import triton_launch

    selection = _selection(blocks, docs, sizes, q.shape[1], k.shape[1])
    dq, dk, dv, dbias, dgate = triton_launch.backward(
        q, k, v, out, lse, dout, dlse, selection, bias, docs, scale, deterministic, gate,
        residual if residual.numel() else None,
    )  # fmt: skip
    dbias = q.new_empty(0) if dbias is None else dbias
    return dq, dk, dv, dbias, q.new_empty(0) if dgate is None else dgate


backward_operator = torch.library.custom_op(
    "gsa::sparse_attention_backward", _backward, mutates_args=()
)


@backward_operator.register_fake
def _(q, k, v, out, residual, lse, dout, dlse, blocks, bias, docs, gate, sizes, scale, _):  # type: ignore[no-untyped-def]
    dbias, dgate = (q.new_empty(0) if x is None else torch.empty_like(x) for x in (bias, gate))
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias, dgate


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, blocks, bias, docs, gate, sizes, scale, _, keep, deterministic = inputs
    out, lse, mass, ungated, residual = output
    assert keep or gate is None, "the backward needs the ungated output"
    out = out if gate is None else ungated
    ctx.save_for_backward(q, k, v, out, residual, lse, blocks, bias, docs, gate)
    ctx.sizes, ctx.scale, ctx.deterministic = sizes, scale, deterministic
    ctx.mark_non_differentiable(mass, ungated, residual)
    ctx.set_materialize_grads(False)


def _gradients(backward, ctx, dout, dlse, *_):  # type: ignore[no-untyped-def]
    q, k, v, out, residual, lse, blocks, bias, docs, gate = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    rest = (blocks, bias, docs, gate, ctx.sizes, ctx.scale, ctx.deterministic)
    dq, dk, dv, dbias, dgate = backward(q, k, v, out, residual, lse, dout, dlse, *rest)
    dbias = None if bias is None else dbias
    dgate = None if gate is None else dgate
    return dq, dk, dv, None, dbias, None, dgate, None, None, None, None, None


forward = differentiable(
    _forward,
    forward_operator,
    _setup,
    partial(_gradients, _backward),
    partial(_gradients, backward_operator),
)


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    bias: Tensor | None,
    docs: Tensor | None,
    gate: Tensor | None,
    sizes: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, E], lse [B, H, T]) of a few queries; has no backward. k and v may be views
    of longer buffers."""
    from . import triton_decode

    selection = _selection(blocks, docs, sizes, q.shape[1], k.shape[1])
    return triton_decode.decode(q, k, v, selection, bias, docs, gate, scale)


decode_operator = torch.library.custom_op("gsa::sparse_attention_decode", _decode, mutates_args=())
decode = undispatched(_decode, decode_operator)


@decode_operator.register_fake
def _(q, k, v, blocks, bias, docs, gate, sizes, scale):  # type: ignore[no-untyped-def]
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    return torch.empty_like(q), lse
