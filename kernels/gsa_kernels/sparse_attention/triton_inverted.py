"""Inverted lists: for each key block, the query tiles that attend it outside their local window.

Every tile marks its blocks in a bit map, and a sweep of a block's row of it writes the block's
list: tiles come in order without a sort, sizes are static, the host never waits. The map is made
for some key blocks at a time, so that scratch is bounded. Long lists (sinks, popular blocks) are
split into segments, so that programs of a backward get like work.

Legend: B batch, HS selection heads, Q query tiles, N selected slots, C keys per block, R queries
per tile, M key blocks.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gsa_kernels.launch import run
from gsa_kernels.selection import Selection
from gsa_kernels.sizes import ceil_div, power_of_2

from .triton_tiles import sink_blocks

_SCRATCH = 1 << 27  # bytes of map


@dataclass(frozen=True)
class InvertedLists:
    """tiles_BHL: tile numbers (from 0), grouped by key block, ascending inside a block.

    places_BHL: for each of them its place in the flattened [Q, N] selection, -1 for a sink; None
    unless asked for. segments_BHG4: key block (-1: unused), places [first, last) of the list,
    number in the block. Every block has a segment 0, which may be empty. All int32.
    """

    tiles_BHL: Tensor
    places_BHL: Tensor | None
    segments_BHG4: Tensor


@triton.jit
def mark(map_ptr, count_ptr, row, tile, there, WORDS):
    """Set the bits of the tiles in the rows of their blocks, and count those that were not set."""
    bit = tl.full(row.shape, 1, tl.int32) << (tile % 32)
    at = map_ptr + row.to(tl.int64) * WORDS + tile // 32
    old = tl.atomic_or(at, bit, mask=there, sem="relaxed")
    tl.atomic_add(count_ptr + row, 1, mask=there & ((old & bit) == 0), sem="relaxed")


@triton.jit
def tile_bits_kernel(
    block_ptr,  # [B, HS, Q, N] int32
    docs_ptr,  # [B, S] int32
    map_ptr,  # [B HS, ROWS, WORDS] int32, zero: bit i % 32 of word i // 32 stands for tile i
    count_ptr,  # [B HS, M] int32, zero in the rows first .. first + ROWS - 1
    first,
    ROWS,
    WORDS,
    M,
    Q,
    N,
    S,
    first_tile,
    HS: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    MOST: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    group = tl.program_id(1)
    tile = (tl.program_id(0) * BT + tl.arange(0, BT))[:, None]
    ok = tile < Q
    into = map_ptr + group.to(tl.int64) * ROWS * WORDS
    counts = count_ptr + group * M + first
    line = block_ptr + (group.to(tl.int64) * Q + tile) * N
    for low in tl.range(0, N, BN):
        n = low + tl.arange(0, BN)[None, :]
        row = tl.load(line + n, mask=ok & (n < N), other=-1) - first
        mark(into, counts, row, tile, (row >= 0) & (row < ROWS), WORDS)
    if SINKS > 0:
        anchor = (first_tile + tile) * R
        sink, end = sink_blocks(docs_ptr, group // HS, anchor, ok, S, C, WINDOW, SINKS, HAS_DOCS)
        sink = sink + tl.arange(0, MOST)[None, :]
        there = ok & (sink < end) & (sink >= first) & (sink < first + ROWS)
        mark(into, counts, sink - first, tile, there, WORDS)


@triton.jit
def tile_lists_kernel(
    map_ptr,
    count_ptr,
    block_ptr,
    tile_ptr,  # [B HS, L] int32
    place_ptr,  # [B HS, L] int32, where PLACES
    segment_ptr,  # [B HS, G, 4] int32
    first,
    ROWS,
    WORDS,
    M,
    Q,
    N,
    L,
    G,
    longest,
    PLACES: tl.constexpr,
    STEPS: tl.constexpr,  # bits of N
    BW: tl.constexpr,
    BM: tl.constexpr,
):
    group, row = tl.program_id(1), tl.program_id(0)
    block = first + row
    counts = count_ptr + group * M
    start = 0
    segments = 0
    for low in range(0, block, BM):
        other = low + tl.arange(0, BM)
        count = tl.load(counts + other, mask=other < block, other=0)
        start += tl.sum(count, 0)
        parts = tl.maximum(tl.cdiv(count, longest), 1)
        segments += tl.sum(tl.where(other < block, parts, 0), 0)
    end = start + tl.load(counts + block)
    parts = tl.maximum(tl.cdiv(end - start, longest), 1)
    table = segment_ptr + group.to(tl.int64) * G * 4
    # The last block also says which segments are not used.
    last = tl.where(block == M - 1, G - segments, parts)
    for low in range(0, last, BM):
        part = low + tl.arange(0, BM)
        at = table + (segments + part) * 4
        used, ok = part < parts, part < last
        tl.store(at, tl.where(used, block, -1), mask=ok)
        tl.store(at + 1, start + part * longest, mask=ok & used)
        tl.store(at + 2, tl.minimum(start + (part + 1) * longest, end), mask=ok & used)
        tl.store(at + 3, part, mask=ok & used)
    read = map_ptr + (group.to(tl.int64) * ROWS + row) * WORDS
    into = group.to(tl.int64) * L + start
    done = 0
    for low in range(0, WORDS, BW):
        word = low + tl.arange(0, BW)
        bits = tl.load(read + word, mask=word < WORDS, other=0)
        each = (bits[:, None] >> tl.arange(0, 32)[None, :]) & 1
        total = tl.sum(each, 1)
        before = done + tl.cumsum(total, 0) - total
        place = into + before[:, None] + tl.cumsum(each, 1) - each
        tile = word[:, None] * 32 + tl.arange(0, 32)[None, :]
        tl.store(tile_ptr + place, tile, mask=each != 0)
        if PLACES:
            # A tile's list ascends: how many entries lie below the block.
            line = block_ptr + (group.to(tl.int64) * Q + tile) * N
            slot = tile * 0
            for step in tl.static_range(STEPS):
                next = slot + (1 << (STEPS - 1 - step))
                there = (each != 0) & (next <= N)
                found = tl.load(line + next - 1, mask=there, other=-1)
                slot = tl.where((found >= 0) & (found < block), next, slot)
            there = (each != 0) & (slot < N)
            own = tl.load(line + slot, mask=there, other=-1) == block
            tl.store(place_ptr + place, tl.where(own, tile * N + slot, -1), mask=each != 0)
        done += tl.sum(total, 0)


def invert(selection: Selection, longest: int, places: bool) -> InvertedLists:
    """Lists of a selection of contiguous tensors; a segment holds at most `longest` tiles."""
    spec, blocks, docs = selection.spec, selection.blocks_BHQN, selection.doc_start_BS
    batch, heads, tiles, slots = blocks.shape
    c, groups, sinks = spec.key_block, batch * heads, selection.sink_slots
    n_blocks, words = ceil_div(selection.n_keys, c), ceil_div(tiles, 32)
    length = tiles * (slots + sinks)
    most = n_blocks + ceil_div(length, longest)

    def table(*shape: int) -> Tensor:
        return torch.empty(batch, heads, *shape, dtype=torch.int32, device=blocks.device)

    lists, segments = table(length), table(most, 4)
    at = table(length) if places else None
    at_once = min(n_blocks, max(1, _SCRATCH // (4 * groups * words)))
    scratch = torch.zeros(
        groups * (n_blocks + at_once * words), dtype=torch.int32, device=blocks.device
    )
    counts, marks = scratch[: groups * n_blocks], scratch[groups * n_blocks :]
    bn = max(16, min(128, power_of_2(slots)))
    for first in range(0, n_blocks, at_once):
        rows = min(at_once, n_blocks - first)
        if first:
            marks.zero_()
        run(
            tile_bits_kernel, (ceil_div(tiles, 8), groups),
            blocks, blocks if docs is None else docs, marks, counts,
            first, rows, words, n_blocks, tiles, slots, selection.n_keys,
            selection.q_start // spec.query_tile,
            HS=heads, C=c, R=spec.query_tile, WINDOW=spec.window, SINKS=spec.sinks,
            MOST=power_of_2(max(1, sinks)), HAS_DOCS=docs is not None, BT=8, BN=bn,
        )  # fmt: skip
        run(
            tile_lists_kernel, (rows, groups),
            marks, counts, blocks, lists, lists if at is None else at, segments,
            first, rows, words, n_blocks, tiles, slots, length, most, longest,
            PLACES=places, STEPS=slots.bit_length(),
            BW=min(32, power_of_2(words)), BM=min(1024, max(16, power_of_2(n_blocks))),
        )  # fmt: skip
    return InvertedLists(lists, at, segments)
