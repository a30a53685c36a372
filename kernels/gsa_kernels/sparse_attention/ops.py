"""torch.library operators over the Triton kernels, so that torch.compile, checkpointing and CUDA
graphs see one opaque call each. Imports no triton until an operator runs.
"""

import torch
from torch import Tensor

from gsa_kernels.selection import Selection, SelectionSpec


def _selection(
    blocks: Tensor, docs: Tensor | None, sizes: list[int], queries: int, keys: int
) -> Selection:
    c, r, window, sinks, q_start = sizes
    spec = SelectionSpec(c, r, window, sinks, blocks.shape[1])
    return Selection(spec, blocks, queries, keys, q_start, docs)


@torch.library.custom_op("gsa::sparse_attention", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    bias: Tensor | None,
    docs: Tensor | None,
    sizes: list[int],
    scale: float,
    need_mass: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [B, T, H, E], lse [B, H, T], mass [B, Hs, Q, N] or empty).

    sizes: C, R, window, sinks, q_start. docs: int32. All contiguous.
    """
    from . import triton_launch

    selection = _selection(blocks, docs, sizes, q.shape[1], k.shape[1])
    return triton_launch.forward(q, k, v, selection, bias, docs, scale, need_mass)


@forward.register_fake
def _(q, k, v, blocks, bias, docs, sizes, scale, need_mass, deterministic):  # type: ignore[no-untyped-def]
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    mass = q.new_empty(blocks.shape if need_mass else (0,), dtype=torch.float32)
    return torch.empty_like(q), lse, mass


@torch.library.custom_op("gsa::sparse_attention_backward", mutates_args=())
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    blocks: Tensor,
    bias: Tensor | None,
    docs: Tensor | None,
    sizes: list[int],
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dbias); dbias is empty without a bias."""
    from . import triton_launch

    selection = _selection(blocks, docs, sizes, q.shape[1], k.shape[1])
    dq, dk, dv, dbias = triton_launch.backward(
        q, k, v, out, lse, dout, dlse, selection, bias, docs, scale, deterministic
    )
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias


@backward.register_fake
def _(q, k, v, out, lse, dout, dlse, blocks, bias, docs, sizes, scale, deterministic):  # type: ignore[no-untyped-def]
    dbias = q.new_empty(0) if bias is None else torch.empty_like(bias)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, blocks, bias, docs, sizes, scale, _, deterministic = inputs
    out, lse, mass = output
    ctx.save_for_backward(q, k, v, out, lse, blocks, bias, docs)
    ctx.sizes, ctx.scale, ctx.deterministic = sizes, scale, deterministic
    ctx.mark_non_differentiable(mass)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout, dlse, _dmass):  # type: ignore[no-untyped-def]
    q, k, v, out, lse, blocks, bias, docs = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv, dbias = backward(
        q, k, v, out, lse, dout, dlse, blocks, bias, docs, ctx.sizes, ctx.scale, ctx.deterministic
    )
    dbias = None if bias is None else dbias
    return dq, dk, dv, None, dbias, None, None, None, None, None


forward.register_autograd(_gradients, setup_context=_setup)
