"""Launches of the selection kernels. Called by ops.py only."""

import torch
from torch import Tensor

from gsa_kernels.sizes import ceil_div, power_of_2

from .kernels import LONGEST
from .triton_select import select_kernel, shrink_kernel

WARP = 1024  # columns of a row per warp: 32 registers of keys
REGISTERS = 128  # of a thread; Triton takes more of rows of one warp, and fewer fit


def top_blocks(
    scores: Tensor,
    columns: int,
    wanted: Tensor | None,
    most: int,
    width: int,
    docs: Tensor | None,
    sizes: list[int],
    first_tile: int,
    parents: Tensor | None,
    ratio: int,
    fine: Tensor,
) -> Tensor:
    """[B, H, rows, width] int32; see ops.top_blocks. fine [1] int32 is set to 0 by NaN."""
    batch, heads, rows, stride = scores.shape
    c, r, window, sinks = sizes or [1, 1, 1, 0]
    device = scores.device
    out = torch.empty(batch, heads, rows, width, device=device, dtype=torch.int32)
    known, held = scores if wanted is None else wanted, scores if docs is None else docs
    lists = scores if parents is None else parents
    s = 0 if docs is None else docs.shape[1]
    common = dict(
        H=heads, C=c, R=r, WINDOW=window, SINKS=sinks, RATIO=ratio,
        HAS_DOCS=docs is not None, HAS_WANTED=wanted is not None,
    )  # fmt: skip
    ranged, listed = bool(sizes), columns > LONGEST
    short, found, count, length = scores, scores, scores, columns
    if listed:
        bn = max(2048, power_of_2(2 * width))
        short = torch.empty(batch, heads, rows, bn, device=device)
        found = torch.empty(batch, heads, rows, bn, device=device, dtype=torch.int32)
        count = torch.empty(batch, heads, rows, device=device, dtype=torch.int32)
        shrink_kernel[(rows, batch * heads)](
            scores, known, held, short, found, count, fine,
            s, first_tile, rows, columns, stride, most,
            **common, RANGE=ranged, BN=bn,
            num_warps=min(32, bn // 256),
        )  # fmt: skip
        length = stride = bn
    bn = max(32, power_of_2(length))
    bm = min(8, max(1, 512 // bn))
    select_kernel[(ceil_div(rows, bm), batch * heads)](
        short, found, count, known, held, lists, out, fine,
        s, first_tile, rows, length, stride, most, width, lists.shape[-1],
        **common, RANGE=ranged and not listed, LISTED=listed, PARENTS=parents is not None,
        BM=bm, BN=bn, BW=min(256, power_of_2(width)),
        num_warps=min(32, max(1, bn // (WARP // 2 if listed else WARP))),
        maxnreg=REGISTERS,
    )  # fmt: skip
    return out
