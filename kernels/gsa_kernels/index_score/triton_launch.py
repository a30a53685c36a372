"""Launches of the scoring kernels. Called by ops.py only."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from gsa_kernels.launch import run
from gsa_kernels.sizes import ceil_div, padded, power_of_2

from .fp8 import FP8, product_dtype
from .ops import ALIGNED
from .triton_scores import pool_kernel, score_kernel


@dataclass(frozen=True)
class _Shape:
    rows: int  # BM
    keys: int  # BN
    warps: int


def _shape(rows: int, width: int, block: int, wide: bool) -> _Shape:
    """block: keys that one score is the largest of (1 where keys are scored as they are). wide:
    float32 operands, each in two halves."""
    if wide:
        keys = max(32 if width <= 64 else 64, block)
        return _Shape(64 if rows > 16 and keys * width <= 2048 else 16, keys, 4)
    if rows <= 16:  # decoding: mostly reading keys
        return _Shape(16, max(128 if width <= 64 else 64, block), 4)
    # Small tiles leave room for four programs or more on a multiprocessor (registers).
    keys = max(64, block)
    return _Shape(64, keys, 4 if keys == 64 else 8)


def n_positions(*tensors: Tensor | None) -> int:
    """S of the tensors [B, S, ...] that there are; 0 if there is none."""
    return next((x.shape[1] for x in tensors if x is not None), 0)


def readable(k: Tensor, dtype: torch.dtype) -> Tensor:
    """k, as `dtype` where it is FP8 and the device's kernels cannot read that (before sm_89)."""
    return k.to(dtype) if k.dtype == FP8 and not _reads_fp8(k.device) else k


@functools.cache
def _reads_fp8(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def pool_keys(
    k_BSI: Tensor, docs_BS: Tensor | None, block: int, parts: int, dtype: torch.dtype | None
) -> Tensor:
    """[B, S // block, parts, I] mean keys, the sum of their parts; inputs contiguous, but k
    along the batch."""
    batch, keys, width = k_BSI.shape
    n = keys // block
    dtype = torch.float32 if parts == 1 else dtype or k_BSI.dtype
    out = torch.empty(batch, n, parts, width, device=k_BSI.device, dtype=dtype)
    if out.numel() == 0:
        return out
    step = min(128, power_of_2(block))
    each = max(1, 8192 // padded(width) // step)
    k_BSI = readable(k_BSI, dtype)
    run(
        pool_kernel, (ceil_div(n, each), batch),
        k_BSI, k_BSI if docs_BS is None else docs_BS, out,
        keys, k_BSI.stride(0), n,
        WIDTH=width, BI=padded(width), C=block, CP=step, BB=each, PARTS=parts,
        HAS_DOCS=docs_BS is not None,
        num_warps=4,
    )  # fmt: skip
    return out


def block_scores(
    q_BTJI: Tensor,
    k_BNPI: Tensor,
    weight_BTJ: Tensor,
    bias_J: Tensor | None,
    docs_BS: Tensor | None,
    sizes: list[int],
    tiles: list[int],
    scale: float,
    sigmoid: bool,
    heads: int,
    single: bool,
    running_BSI: Tensor | None,
    ratio: int,
    edge_start: int = 0,
) -> Tensor:
    """[B, H, rows, stride] float32 scores of query tiles; see ops.block_scores."""
    c, r, window, sinks, q_start = sizes
    first_tile, stop, columns = tiles
    batch, queries, index_heads, width = q_BTJI.shape
    key_rows, parts = k_BNPI.shape[1:3]
    rows = stop - first_tile
    stride = ceil_div(columns, ALIGNED) * ALIGNED
    out = torch.empty(batch, heads, rows, stride, device=q_BTJI.device, dtype=torch.float32)
    wide = q_BTJI.dtype != product_dtype(q_BTJI, k_BNPI) or q_BTJI.dtype == torch.float32
    k_BNPI = readable(k_BNPI, q_BTJI.dtype)
    block = power_of_2(c) if single else 1
    shape = _shape(rows, padded(width), block, wide)
    grid = (ceil_div(columns * block, shape.keys), ceil_div(rows, shape.rows), batch * heads)
    run(
        score_kernel, grid,
        q_BTJI, k_BNPI, weight_BTJ, weight_BTJ if bias_J is None else bias_J,
        weight_BTJ if docs_BS is None else docs_BS,
        weight_BTJ if running_BSI is None else running_BSI, out,
        queries, n_positions(docs_BS, running_BSI), q_start, first_tile, rows, key_rows,
        k_BNPI.stride(0), n_positions(running_BSI), edge_start, stride, scale,
        J=index_heads, H=heads, WIDTH=width, BI=padded(width),
        C=c, R=r, WINDOW=window, SINKS=sinks,
        PARTS=parts, SINGLE=single, CP=block, RATIO=ratio, EDGE=running_BSI is not None,
        SIGMOID=sigmoid, WIDE=wide,
        HAS_BIAS=bias_J is not None, HAS_DOCS=docs_BS is not None, BM=shape.rows, BN=shape.keys,
        num_warps=shape.warps,
    )  # fmt: skip
    return out
