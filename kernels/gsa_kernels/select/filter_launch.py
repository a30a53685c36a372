"""Launches of the kernels that choose single keys of long rows. Called by ops.py only."""

from typing import Any

import torch
from torch import Tensor

from gsa_kernels.index_score.fp8 import product_dtype
from gsa_kernels.index_score.triton_launch import block_scores, n_positions, readable
from gsa_kernels.launch import run
from gsa_kernels.sizes import ceil_div, padded, power_of_2

from .triton_exact import DIGITS, LONGEST_SPLIT, digit_kernel, write_kernel
from .triton_filter import filter_kernel, pick_kernel, threshold_kernel

ROWS, KEYS, WARPS, STAGES = 64, 64, 4, 3
SAMPLES_PER_WARP, PLACES_PER_WARP = 1024, 512
EXACT_ROWS, EXACT_KEYS, EXACT_WARPS = 64, 32, 4  # more keys per step, and registers are spilled
PROGRAMS, SPLITS = 528, 256  # of exact choices: programs in all, splits of a tile's keys


def filtered_keys(
    q: Tensor,
    k: Tensor,
    sample: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    docs: Tensor | None,
    wanted: Tensor | None,
    most: int,
    width: int,
    sizes: list[int],
    tiles: list[int],
    places: int,
    stride: int,
    scale: float,
    sigmoid: bool,
    heads: int,
    fine: Tensor,
) -> Tensor:
    """[B, H, rows, width] int32; see ops.filtered_keys. fine [1] int32 is set to 0 by NaN."""
    r, window, sinks, q_start = sizes
    first_tile, stop, columns = tiles
    batch, queries, index_heads, channels = q.shape
    rows, lists, device = stop - first_tile, batch * heads, q.device
    held = weight if docs is None else docs
    each = weight if wanted is None else wanted
    s = n_positions(docs)
    range_of = dict(H=heads, R=r, WINDOW=window, SINKS=sinks, HAS_DOCS=docs is not None)
    per_row = (batch, heads, rows)

    def guess() -> Tensor:
        bound = torch.empty(per_row, device=device)
        scores = block_scores(
            q, sample, weight, bias, docs, [1, r, window, sinks, q_start],
            [first_tile, stop, columns // stride], scale, sigmoid, heads, False, None, stride,
        )  # fmt: skip
        bn = max(128, power_of_2(columns // stride))
        run(
            threshold_kernel, (rows, lists),
            scores, held, each, bound, s, first_tile, rows, scores.shape[-1], most,
            **range_of, STRIDE=stride, CAP=places, HAS_WANTED=wanted is not None, BN=bn,
            num_warps=min(32, max(1, bn // SAMPLES_PER_WARP)),
        )  # fmt: skip
        return bound

    k = readable(k, q.dtype)
    bound = guess()  # the sample's scores are let go before the lists are made
    items = torch.empty(*per_row, places, device=device, dtype=torch.int64)
    count = torch.empty(*per_row, 2, device=device, dtype=torch.int32)
    out = torch.empty(*per_row, width, device=device, dtype=torch.int32)
    common: dict[str, Any] = dict(
        J=index_heads, WIDTH=channels, BI=padded(channels), **range_of, SIGMOID=sigmoid,
        WIDE=q.dtype != product_dtype(q, k) or q.dtype == torch.float32,
        HAS_BIAS=bias is not None,
    )  # fmt: skip
    run(
        filter_kernel, (ceil_div(rows, ROWS), 2, lists),
        q, k, weight, weight if bias is None else bias, held, bound, items, count,
        queries, s, q_start, first_tile, rows, k.shape[1], scale,
        **common, CAP=places, BM=ROWS, BN=KEYS if index_heads <= 4 * heads else 32, STAGES=STAGES,
        num_warps=WARPS,
    )  # fmt: skip
    fill = min(256, power_of_2(width))
    # pick_kernel names the rows for which the launches after it choose.
    named = torch.empty(per_row, device=device, dtype=torch.int32)
    n_named = torch.zeros(batch, heads, device=device, dtype=torch.int32)
    total = torch.empty(*per_row, DIGITS, 16, device=device, dtype=torch.int32)
    run(
        pick_kernel, (rows, lists),
        items, count, bound, each, out, named, n_named, total, fine, rows, most, width,
        CAP=places, TOTALS=DIGITS * 16, HAS_WANTED=wanted is not None, BW=fill,
        num_warps=min(32, max(1, places // PLACES_PER_WARP)),
    )  # fmt: skip
    programs = max(1, PROGRAMS // lists)
    n_items = max(programs, ceil_div(rows, EXACT_ROWS) * ceil_div(columns, LONGEST_SPLIT.value))
    parts = torch.empty(lists, n_items, 17, EXACT_ROWS, device=device, dtype=torch.int32)
    inputs = (q, k, weight, weight if bias is None else bias, held)
    rows_of = (each, named, n_named, total, parts)
    numbers = (queries, s, q_start, first_tile, rows, columns, k.shape[1], n_items, most)
    common.update(
        HAS_WANTED=wanted is not None, DIGITS=DIGITS, SPLITS=SPLITS, BM=EXACT_ROWS,
        num_warps=EXACT_WARPS,
        BN=EXACT_KEYS if index_heads <= 4 * heads else EXACT_KEYS // 2,
    )  # fmt: skip
    for level in range(DIGITS):
        run(digit_kernel, (programs, lists), *inputs, *rows_of, *numbers, level, scale, **common)
    run(
        write_kernel, (programs, lists),
        *inputs, *rows_of, out, fine, *numbers, width, scale,
        **common, BW=fill,
    )  # fmt: skip
    return out
