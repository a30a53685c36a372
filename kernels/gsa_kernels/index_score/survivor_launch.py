"""Launches of the kernels of coarse-to-fine scores. Called by survivor_ops.py only."""

import torch
from torch import Tensor

from gsa_kernels.launch import run
from gsa_kernels.sizes import ceil_div, padded, power_of_2

from .fp8 import product_dtype
from .triton_launch import n_positions, readable
from .triton_survivors import running_kernel, survivor_kernel

PROGRAMS = 512  # fewer than that split their lists
ROWS = 64  # of a product of neighbouring queries
APART = 16  # queries per tile from which neighbouring tiles are taken to share little


def running_pool(
    k_BSI: Tensor, docs_BS: Tensor | None, pool: int, pooling: str, dtype: torch.dtype | None
) -> Tensor:
    """[B, S, I], or [B, S, 2 I] for bounds; inputs contiguous, but k along the batch."""
    batch, keys, width = k_BSI.shape
    folds = 2 if pooling == "bound" else 1
    dtype = dtype or k_BSI.dtype
    out = torch.empty(batch, keys, folds * width, device=k_BSI.device, dtype=dtype)
    if out.numel():
        k_BSI = readable(k_BSI, dtype)
        run(
            running_kernel, (ceil_div(keys, pool), batch),
            k_BSI, k_BSI if docs_BS is None else docs_BS, out,
            keys, k_BSI.stride(0),
            WIDTH=width, BI=power_of_2(width), POOL=pool, MEAN=pooling == "mean", FOLDS=folds,
            HAS_DOCS=docs_BS is not None,
            num_warps=1,
        )  # fmt: skip
    return out


def survivor_scores(
    q_BTJI: Tensor,
    k_BNPI: Tensor,
    weight_BTJ: Tensor,
    bias_J: Tensor | None,
    docs_BS: Tensor | None,
    lists_BHQP: Tensor,
    sizes: list[int],
    first_tile: int,
    scale: float,
    sigmoid: bool,
    single: bool,
) -> Tensor:
    """[B, H, rows, P * ratio] float32; see survivor_ops.survivor_scores."""
    c, r, window, sinks, q_start, ratio = sizes
    batch, queries, index_heads, width = q_BTJI.shape
    key_rows, parts = k_BNPI.shape[1:3]
    heads, rows, slots = lists_BHQP.shape[1:]
    out = torch.empty(batch, heads, rows, slots * ratio, device=q_BTJI.device, dtype=torch.float32)
    wide = q_BTJI.dtype != product_dtype(q_BTJI, k_BNPI) or q_BTJI.dtype == torch.float32
    k_BNPI = readable(k_BNPI, q_BTJI.dtype)
    block = power_of_2(c) if single else 1
    jp = power_of_2(index_heads // heads)
    most = 16 if wide or r >= APART or rows * jp < ROWS else ROWS
    bm = max(1, most // jp)
    bn = max(min(32 if wide else 64, power_of_2(ratio * block)), block, 16)
    programs = ceil_div(rows, bm) * batch * heads
    span = ceil_div(slots, min(slots, ceil_div(PROGRAMS, programs)))
    run(
        survivor_kernel, (ceil_div(rows, bm), ceil_div(slots, span), batch * heads),
        q_BTJI, k_BNPI, weight_BTJ, weight_BTJ if bias_J is None else bias_J,
        weight_BTJ if docs_BS is None else docs_BS, lists_BHQP, out,
        queries, n_positions(docs_BS), q_start, first_tile, rows, key_rows, k_BNPI.stride(0),
        slots, span, scale,
        J=index_heads, H=heads, WIDTH=width, BI=padded(width),
        C=c, R=r, WINDOW=window, SINKS=sinks, RATIO=ratio,
        PARTS=parts, SINGLE=single, CP=block, SIGMOID=sigmoid, WIDE=wide,
        HAS_BIAS=bias_J is not None, HAS_DOCS=docs_BS is not None, BM=bm, JP=jp, BN=bn,
        num_warps=4,
    )  # fmt: skip
    return out
