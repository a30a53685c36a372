"""Launches of the kernels that choose single keys of long rows. Called by ops.py only."""

from typing import Any

import torch
from torch import Tensor

from gsa_kernels.index_score.fp8 import product_dtype
from gsa_kernels.index_score.triton_launch import (
    block_scores,
    ceil_div,
    n_positions,
    padded,
    power_of_2,
    readable,
)

from .triton_filter import exact_kernel, filter_kernel, pick_kernel, threshold_kernel

ROWS, KEYS, WARPS, STAGES = 64, 64, 4, 3
SAMPLES_PER_WARP, PLACES_PER_WARP = 1024, 512
EXACT_KEYS = 32  # fewer registers


def filtered_keys(
    q: Tensor,
    k: Tensor,
    sample: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    docs: Tensor | None,
    wanted: int,
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
        threshold_kernel[(rows, lists)](
            scores, held, bound, s, first_tile, rows, scores.shape[-1], wanted,
            **range_of, STRIDE=stride, CAP=places, BN=bn,
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
        CAP=places,
    )  # fmt: skip
    filter_kernel[(ceil_div(rows, ROWS), 2, lists)](
        q, k, weight, weight if bias is None else bias, held, bound, items, count,
        queries, s, q_start, first_tile, rows, k.shape[1], scale,
        **common, BM=ROWS, BN=KEYS if index_heads <= 4 * heads else 32, STAGES=STAGES,
        num_warps=WARPS,
    )  # fmt: skip
    fill = min(256, power_of_2(width))
    pick_kernel[(rows, lists)](
        items, count, bound, out, fine, rows, wanted, width,
        CAP=places, BW=fill,
        num_warps=min(32, max(1, places // PLACES_PER_WARP)),
    )  # fmt: skip
    exact_kernel[(ceil_div(rows, 64), lists)](
        q, k, weight, weight if bias is None else bias, held, bound, count, out, fine,
        queries, s, q_start, first_tile, rows, k.shape[1], wanted, width, scale,
        **common, BM=64, BN=EXACT_KEYS, BW=fill,
        num_warps=8,
    )  # fmt: skip
    return out
