"""Launches of the kernels of the training signals: sizes, buffers, grids. For ops.py only."""

import torch
from torch import Tensor

from gsa_kernels.launch import run
from gsa_kernels.sizes import ceil_div, power_of_2

from .triton_kl import candidate_kernel, kl_kernel
from .triton_mass import block_mass_kernel, lse_kernel, merge_kernel

LOG2E = 1.4426950408889634
SPLITS = 32  # most ranges of keys in the first pass; a few tiles alone would leave a GPU idle
PROGRAMS = 8192  # with as many, there is no need for more ranges
LONGEST = 4096  # scores of a row at a time


def block_mass(
    q: Tensor, k: Tensor, tiles: Tensor, docs: Tensor | None, sizes: list[int]
) -> Tensor:
    """[B, Hs, n, blocks]; inputs contiguous. sizes: C, R, q_start, Hs.

    Beside the result it holds at most B n R H (SPLITS + 1) float32 numbers (rows padded to whole
    steps), 13 MB for 8 tiles of 64 queries with 12 heads; without SPLITS for very many tiles.
    """
    c, r, q_start, selection_heads = sizes
    batch, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    n = tiles.numel()
    wide = q.element_size() > 2 or width > 128
    rows = r * heads // kv_heads
    bm = min(32 if wide else 64, max(16, power_of_2(rows)))
    bn, warps = 64, 8 if wide else 4
    # Blocks that are no even part of a step are summed up from single keys.
    inside = c if bn % c == 0 else 1
    blocks = ceil_div(keys, inside)
    programs = batch * n * kv_heads * ceil_div(rows, bm)
    splits = max(1, min(SPLITS, ceil_div(keys, 4 * bn), PROGRAMS // programs))
    span = ceil_div(ceil_div(keys, splits), bn) * bn
    part = torch.empty(programs * bm, splits, device=q.device, dtype=torch.float32)
    lse = torch.empty(programs * bm, device=q.device, dtype=torch.float32)
    mass = torch.empty(batch, selection_heads, n, blocks, device=q.device, dtype=torch.float32)
    documents = tiles if docs is None else docs
    scale = width**-0.5 * LOG2E
    shape = dict(H=heads, K=kv_heads, E=width, BE=max(16, power_of_2(width)), R=r, BM=bm, BN=bn)
    run(
        lse_kernel, (programs, splits),
        q, k, tiles, documents, part, queries, keys, q_start, q_start // r, n, span, scale,
        **shape, SPLITS=splits, HAS_DOCS=docs is not None, STAGES=1 if wide else 3,
        num_warps=warps,
    )  # fmt: skip
    run(
        merge_kernel, (programs,), part, lse,
        SPLITS=splits, BS=power_of_2(splits), BM=bm, num_warps=1,
    )  # fmt: skip
    run(
        block_mass_kernel, (batch * selection_heads * n, ceil_div(keys, bn)),
        q, k, tiles, documents, lse, mass, queries, keys, q_start, q_start // r, n, blocks, scale,
        **shape, HS=selection_heads, C=inside, HAS_DOCS=docs is not None,
        num_warps=warps,
    )  # fmt: skip
    if inside == c:
        return mass
    pad = -keys % c
    return torch.nn.functional.pad(mass, (0, pad)).unflatten(-1, (-1, c)).sum(-1)


def candidate_blocks(
    tiles: Tensor, docs: Tensor | None, batch: int, keys: int, sizes: list[int]
) -> Tensor:
    """[B, Hs, n, keys // C] int32. sizes: C, R, window, sinks, q_start, Hs."""
    c, r, window, sinks, q_start, heads = sizes
    n, width = tiles.numel(), keys // c
    blocks = torch.empty(batch, heads, n, width, device=tiles.device, dtype=torch.int32)
    run(
        candidate_kernel, (batch * heads * n, ceil_div(width, 1024)),
        tiles, tiles if docs is None else docs, blocks, keys, q_start // r, n, width,
        H=heads, C=c, R=r, WINDOW=window, SINKS=sinks, HAS_DOCS=docs is not None, BN=1024,
    )  # fmt: skip
    return blocks


def kl_rows(scores: Tensor, mass: Tensor, log: bool, eps: float) -> tuple[Tensor, Tensor]:
    """(loss and count [2, B, H, Q], d loss / d scores [B, H, Q, N]); inputs float32."""
    width = scores.shape[-1]
    rows = scores.numel() // width
    loss = torch.empty(2, *scores.shape[:-1], device=scores.device, dtype=torch.float32)
    grad = torch.empty_like(scores)
    bn = min(LONGEST, max(16, power_of_2(width)))
    br = max(1, 1024 // bn)
    run(
        kl_kernel, (ceil_div(rows, br),),
        scores, mass, loss, grad, rows, width,
        EPS=eps, LOG=log, BR=br, BN=bn, num_warps=8 if bn == LONGEST else 4,
    )  # fmt: skip
    return loss, grad
