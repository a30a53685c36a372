"""Launches of the kernels that score listed blocks. Called by at_ops.py only."""

from typing import Any

import torch
from torch import Tensor

from gsa_kernels.launch import run
from gsa_kernels.sizes import ceil_div, power_of_2

from .at_union_launch import union_gradients, united
from .fp8 import product_dtype
from .triton_at import gradient_kernel, scores_kernel
from .triton_launch import readable

PROGRAMS = 1024  # of the backward, where rows are few and their lists long


def _sizes(
    q: Tensor, keys: Tensor, blocks: Tensor, r: int, sigmoid: bool, most: int
) -> dict[str, Any]:
    """Constants of both kernels. most: slots per step, fewer for large or exact products."""
    heads, width = q.shape[2:]
    groups, slots = blocks.shape[1], blocks.shape[3]
    bj = max(16, power_of_2(heads // groups))
    bi = max(16, power_of_2(width))
    multiplied = product_dtype(q, keys)
    exact = q.element_size() == multiplied.itemsize == 4
    large = bj * bi > 2048
    most = 16 if large else min(most, 32 if exact else 64)
    return dict(
        J=heads,
        D=width,
        HS=groups,
        R=r,
        BJ=bj,
        BI=bi,
        BN=min(most, max(16, power_of_2(slots))),
        SIGMOID=sigmoid,
        SAME=q.dtype == multiplied and q.element_size() == 2,
        WIDE="ieee" if exact else "tf32x3",
        num_warps=8 if large else 2,
    )


def scores(
    q: Tensor,
    keys: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    blocks: Tensor,
    tiles: Tensor | None,
    r: int,
    scale: float,
    sigmoid: bool,
) -> Tensor:
    """[B, Hs, Q, N] float32; inputs contiguous."""
    batch, groups, rows, slots = blocks.shape
    out = torch.empty(blocks.shape, device=q.device, dtype=torch.float32)
    keys = readable(keys, q.dtype)
    sizes = _sizes(q, keys, blocks, r, sigmoid, 64)
    run(
        scores_kernel, (batch * groups * rows, ceil_div(slots, sizes["BN"])),
        q, keys, weight, weight if bias is None else bias, blocks,
        blocks if tiles is None else tiles, out,
        q.shape[1], keys.shape[1], rows, slots, scale,
        **sizes, HAS_TILES=tiles is not None, HAS_BIAS=bias is not None,
    )  # fmt: skip
    return out


def gradients(
    dscore: Tensor,
    q: Tensor,
    keys: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    blocks: Tensor,
    tiles: Tensor | None,
    r: int,
    scale: float,
    sigmoid: bool,
    start: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dkeys, dweight, dbias) in the dtypes of the inputs, which are contiguous."""
    if united(q, keys, blocks, tiles, r, start):
        return union_gradients(dscore, q, keys, weight, bias, blocks, start, scale, sigmoid)
    batch, groups, rows, slots = blocks.shape
    dtype, keys = keys.dtype, readable(keys, q.dtype)
    sizes = _sizes(q, keys, blocks, r, sigmoid, 32)
    lines, bn = batch * groups * rows, sizes["BN"]
    span = ceil_div(ceil_div(slots, ceil_div(PROGRAMS, lines)), bn) * bn
    splits = ceil_div(slots, span)

    # Whole sums are rounded once and lie where they belong; parts are added up in float32.
    placed = splits == 1 and tiles is None
    step = r if placed else 1
    length = q.shape[1] if placed else rows
    make = torch.empty if step == 1 else torch.zeros

    def part(like: Tensor, *inner: int) -> Tensor:
        dtype = like.dtype if splits == 1 else torch.float32
        return make(splits, batch, length, *inner, device=q.device, dtype=dtype)

    heads, width = q.shape[2:]
    dq, dw = part(q, heads, width), part(weight, heads)
    dk = torch.zeros(keys.shape, device=q.device, dtype=torch.float32)
    dbias = torch.empty(
        (0,) if bias is None else (splits * batch * rows, heads),
        device=q.device,
        dtype=torch.float32,
    )
    run(
        gradient_kernel, (lines, splits),
        q, keys, weight, weight if bias is None else bias, blocks,
        blocks if tiles is None else tiles, dscore, dq, dk, dw, dbias,
        q.shape[1], keys.shape[1], rows, slots, length, span, scale,
        **sizes, STEP=step, HAS_TILES=tiles is not None, HAS_BIAS=bias is not None,
    )  # fmt: skip
    return (
        dq[0] if placed else _placed(dq, q, tiles, r),
        dk.to(dtype),
        dw[0] if placed else _placed(dw, weight, tiles, r),
        None if bias is None else dbias.sum(0).to(bias.dtype),
    )


def _placed(parts: Tensor, like: Tensor, tiles: Tensor | None, r: int) -> Tensor:
    """Gradient of all T rows from parts [SPLITS, B, Q, ...] of those that were scored."""
    rows = parts[0] if parts.shape[0] == 1 else parts.sum(0).to(like.dtype)
    if tiles is None and r == 1:
        return rows
    out = torch.zeros_like(like)
    if tiles is None:
        out[:, ::r] = rows
        return out
    return out.index_add_(1, tiles.long() * r, rows)
