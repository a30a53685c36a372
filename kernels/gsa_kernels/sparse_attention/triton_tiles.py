"""What the kernels know of query tiles beside their lists: how many entries, and which sinks.

Legend: B batch, HS selection heads, Q query tiles, N list slots, C keys per block, R queries per
tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gsa_kernels.launch import run
from gsa_kernels.selection import Selection
from gsa_kernels.sizes import ceil_div, power_of_2


@triton.jit
def sink_region(docs_ptr, b, anchor, ok, S, C: tl.constexpr, SINKS: tl.constexpr,
                HAS_DOCS: tl.constexpr):  # fmt: skip
    """[first, end) of the keys of the sink blocks of tiles, as TileLayout has them."""
    start = anchor * 0
    if HAS_DOCS:
        start = tl.load(docs_ptr + b.to(tl.int64) * S + anchor, mask=ok, other=0).to(tl.int32)
    return start // C * C, (start + SINKS + C - 1) // C * C


@triton.jit
def sink_blocks(docs_ptr, b, anchor, ok, S, C: tl.constexpr, WINDOW: tl.constexpr,
                SINKS: tl.constexpr, HAS_DOCS: tl.constexpr):  # fmt: skip
    """[first, end) of the sink blocks that lie before the local windows of tiles."""
    low, high = sink_region(docs_ptr, b, anchor, ok, S, C, SINKS, HAS_DOCS)
    return low // C, tl.minimum(high, tl.maximum(anchor - WINDOW + 1, 0)) // C


@triton.jit
def tile_kernel(
    block_ptr,  # [B, HS, Q, N] int32
    docs_ptr,  # [B, S]
    count_ptr,  # [B, HS, Q] int32, where COUNTS
    sink_ptr,  # [B, Q, 2] int32, where SINKS > 0; [1, Q, 2] without documents
    Q,
    N,
    S,
    q_start,
    HS: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    SINKS: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    COUNTS: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    tile, line = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1)
    ok = tile < Q
    if COUNTS:
        at = line.to(tl.int64) * Q + tile
        count = tl.zeros([BT], tl.int32)
        for low in tl.range(0, N, BN):
            n = low + tl.arange(0, BN)[None, :]
            there = ok[:, None] & (n < N)
            block = tl.load(block_ptr + at[:, None] * N + n, mask=there, other=-1)
            count += tl.sum((block >= 0).to(tl.int32), 1)
        tl.store(count_ptr + at, count, mask=ok)
    if SINKS > 0:
        if (line == 0) | (HAS_DOCS & (line % HS == 0)):
            anchor = (q_start // R + tile) * R
            if not COUNTS:  # queries that choose alone: those of the tile's first serve all
                anchor = tl.maximum(anchor, q_start)
            first, end = sink_region(docs_ptr, line // HS, anchor, ok, S, C, SINKS, HAS_DOCS)
            into = sink_ptr + (line // HS * Q + tile) * 2
            tl.store(into, first, mask=ok)
            tl.store(into + 1, end, mask=ok)


def tile_table(
    selection: Selection, rows: int, united: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(entries [B, HS, Q], sink ranges [B or 1, Q, 2] or None) of tiles of `rows` queries; int32.

    united: the tiles hold queries that choose alone, whose lists are another matter (None), and
    the sinks are those of a tile's first query.
    """
    spec, blocks, docs = selection.spec, selection.blocks_BHQN, selection.doc_start_BS
    batch, heads, _, slots = blocks.shape
    start = selection.q_start
    tiles = ceil_div(start + selection.n_queries, rows) - start // rows
    sinks = counts = None
    if spec.sinks:
        shape = (1 if docs is None else batch, tiles, 2)
        sinks = torch.empty(shape, dtype=torch.int32, device=blocks.device)
    if not united:
        counts = torch.empty((batch, heads, tiles), dtype=torch.int32, device=blocks.device)
    if sinks is None and counts is None:
        return None, None
    bn = max(16, min(128, power_of_2(slots)))
    run(
        tile_kernel, (ceil_div(tiles, 32), batch * heads),
        blocks, blocks if docs is None else docs, blocks if counts is None else counts,
        blocks if sinks is None else sinks,
        tiles, slots, selection.n_keys, start,
        HS=heads, C=spec.key_block, R=rows, SINKS=spec.sinks, HAS_DOCS=docs is not None,
        COUNTS=not united, BT=32, BN=bn,
    )  # fmt: skip
    return counts, sinks
