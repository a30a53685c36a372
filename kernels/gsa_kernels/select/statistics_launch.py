"""Launches of the kernels that take statistics of scores. Called by ops.py only."""

from typing import Any

import torch
from torch import Tensor

from gsa_kernels.index_score.fp8 import product_dtype
from gsa_kernels.index_score.triton_launch import n_positions, readable
from gsa_kernels.launch import run
from gsa_kernels.sizes import ceil_div, padded

from .triton_statistics import merge_kernel, part_kernel

# The order of a row's sums: the same for one row as for all rows of a sequence.
SEGMENT = 1024  # keys of a program
ROWS, KEYS, WARPS, STAGES = 64, 64, 4, 3
MERGED = 128  # rows of a program


def key_statistics(
    q: Tensor,
    k: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    docs: Tensor | None,
    sizes: list[int],
    tiles: list[int],
    scale: float,
    sigmoid: bool,
    heads: int,
    entropy: bool,
) -> Tensor:
    """[5, B, H, rows] float32; see ops.key_statistics."""
    r, window, sinks, q_start = sizes
    first_tile, stop, columns = tiles
    batch, queries, index_heads, channels = q.shape
    rows, lists = stop - first_tile, batch * heads
    segments, fields = ceil_div(columns, SEGMENT), 7 if entropy else 4
    parts = torch.empty(lists, segments, fields, rows, device=q.device)
    out = torch.empty(4 + entropy, batch, heads, rows, device=q.device)
    held, s = weight if docs is None else docs, n_positions(docs)
    common: dict[str, Any] = dict(
        H=heads, R=r, WINDOW=window, SINKS=sinks, HAS_DOCS=docs is not None, ENTROPY=entropy,
        FIELDS=fields, SEGMENT=SEGMENT, num_warps=WARPS,
    )  # fmt: skip
    k = readable(k, q.dtype)
    run(
        part_kernel, (ceil_div(rows, ROWS), segments, lists),
        q, k, weight, weight if bias is None else bias, held, parts,
        queries, s, q_start, first_tile, rows, k.shape[1], k.stride(0), segments, scale,
        J=index_heads, WIDTH=channels, BI=padded(channels), SIGMOID=sigmoid,
        WIDE=q.dtype != product_dtype(q, k) or q.dtype == torch.float32,
        HAS_BIAS=bias is not None, BM=ROWS, BN=KEYS if index_heads <= 4 * heads else KEYS // 2,
        STAGES=STAGES,
        **common,
    )  # fmt: skip
    run(
        merge_kernel, (ceil_div(rows, MERGED), lists),
        parts, held, out, s, first_tile, rows, segments,
        **common, BM=MERGED,
    )  # fmt: skip
    return out
