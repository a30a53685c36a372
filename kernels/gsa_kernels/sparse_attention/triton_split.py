"""Near and far choices of single queries (R = 1), and the far ones by key block.

A choice is near where enough queries of the group before made it: such a block is worth fetching
for a whole group, which the union tiles do. One answer holds for a group, and later queries are
never asked, so what a row is computed from, and in which order, does not depend on them. Far
choices are listed by key block, for programs that keep a block and gather its queries (see
triton_gather.py).

Two far choices of a query whose blocks follow each other can be a pair, gathered as one: text
chooses that way, and a pair's query is read, and its part written, once. A run of such blocks is
taken from its first, two at a time. Which are pairs depends on the query's own list alone.

Queries go in chunks, each with lists of its own, all made in the same launches. Sizes are static
and the host never waits. A part takes its place in its block's list by an atomic count: the order
inside a list is not defined, and no result of the forward depends on it.

Legend: B batch, HS selection heads, T queries, N slots of a query, C keys per block, Q chunks, M
key blocks, D kinds of parts: single blocks and, where choices are paired, pairs.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from gsa_kernels.launch import run
from gsa_kernels.selection import Selection
from gsa_kernels.sizes import ceil_div, power_of_2

from .triton_union import UNITED

# Compiled once for all their values.
_NUMBERS = ("T", "M", "Q", "q_start", "size", "least", "longest", "most")


@dataclass(frozen=True)
class Split:
    """near: the selection without its far choices. A part is one far choice, or a pair of them; of
    a query, pairs come first. places_BHL: the parts of chunk after chunk, by kind and key block,
    each as t N + n for query t of the chunk and its n-th part; chunk i begins at i size N.
    entries_BHTN: where in its chunk's places each part is, -1 past the last. items_BHQDM3: a key
    block, of a pair the first, and the places [first, last) of up to `longest` of its parts;
    used_BHQD says how many there are. counts_3BHT: near choices, far choices, pairs.

    moved_BHTN, where it was asked for: where a slot of the selection is now, near ones from 0 and
    far ones after them, by part; int64. All else int32.
    """

    near: Selection
    size: int
    places_BHL: Tensor
    entries_BHTN: Tensor
    items_BHQDM3: Tensor
    used_BHQD: Tensor
    counts_3BHT: Tensor
    moved_BHTN: Tensor | None


@triton.jit(do_not_specialize=_NUMBERS)
def split_kernel(
    block_ptr,  # [B HS, T, N] int32
    near_ptr,  # the same
    far_ptr,  # the same; what is past the last is not written
    slot_ptr,  # the same: slots of the far choices; only where MOVED
    moved_ptr,  # the same, int64: of the near choices and of empty slots; only where MOVED
    count_ptr,  # [3, B HS, T] int32
    T,
    q_start,
    least,
    N: tl.constexpr,
    UNITED: tl.constexpr,
    MOVED: tl.constexpr,
    STEPS: tl.constexpr,  # bits of N
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    line = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    t, n = row[:, None], tl.arange(0, BN)[None, :]
    ok = (t < T) & (n < N)
    lists = block_ptr + line * T * N
    at = t.to(tl.int64) * N + n
    block = tl.load(lists + at, mask=ok, other=-1)
    there = block >= 0
    chose = tl.zeros([BT, BN], tl.int32)
    last = (t + q_start) // UNITED * UNITED - 1 - q_start  # of the group before
    asked = tl.where(least > UNITED, 0, UNITED)  # nobody, where no choice can be near
    for back in tl.range(0, asked, loop_unroll_factor=2):
        # The lists ascend: how many entries of the earlier one lie below the block.
        may = there & (last >= back)
        earlier = lists + (last - back).to(tl.int64) * N
        slot = tl.zeros([BT, BN], tl.int32)
        for step in tl.static_range(STEPS):
            next = slot + (1 << (STEPS - 1 - step))
            found = tl.load(earlier + next - 1, mask=may & (next <= N), other=-1)
            slot = tl.where((found >= 0) & (found < block), next, slot)
        found = tl.load(earlier + slot, mask=may & (slot < N), other=-1)
        chose += (there & (found == block)).to(tl.int32)
    near = (chose >= least).to(tl.int32)
    far = there.to(tl.int32) - near
    nears, fars = tl.sum(near, 1), tl.sum(far, 1)
    before_near, before_far = tl.cumsum(near, 1) - near, tl.cumsum(far, 1) - far
    first, into = line * T * N, t.to(tl.int64) * N
    tl.store(near_ptr + first + into + before_near, block, mask=near != 0)
    tl.store(near_ptr + first + at, -1, mask=ok & (n >= nears[:, None]))
    tl.store(far_ptr + first + into + before_far, block, mask=far != 0)
    tl.store(count_ptr + line * T + row, nears, mask=row < T)
    tl.store(count_ptr + (tl.num_programs(1) + line) * T + row, fars, mask=row < T)
    if MOVED:
        tl.store(slot_ptr + first + into + before_far, n + tl.zeros_like(far), mask=far != 0)
        place = tl.where(near != 0, before_near, n)
        tl.store(moved_ptr + first + at, place, mask=ok & (far == 0))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=_NUMBERS)
def pair_kernel(
    far_ptr,
    slot_ptr,
    moved_ptr,  # takes what far choices become; only where MOVED
    key_ptr,  # [B HS, T, N] int32: block of a part, plus M where it is a pair
    rank_ptr,  # the same: number of a part in the list of its kind, block and chunk
    taken_ptr,  # [B HS, Q, D, M] int32, zero: parts of a block
    count_ptr,  # [3, B HS, T] int32; pairs are written
    T,
    M,
    Q,
    size,
    N: tl.constexpr,
    PAIRED: tl.constexpr,
    MOVED: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    D: tl.constexpr = 2 if PAIRED else 1
    line, lines = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    count = tl.load(count_ptr + (lines + line) * T + row, mask=row < T, other=0)[:, None]
    t, n = row[:, None], tl.arange(0, BN)[None, :]
    there = n < count
    into = (line * T + t) * N
    block = tl.load(far_ptr + into + n, mask=there, other=0)
    key, part, choice = block, n + tl.zeros_like(block), n + tl.zeros_like(block)
    heads = there
    pairs = tl.zeros([BT], tl.int32)
    if PAIRED:
        before = tl.load(far_ptr + into + n - 1, mask=there & (n > 0), other=-2)
        after = tl.load(far_ptr + into + n + 1, mask=there & (n + 1 < count), other=-2)
        run = tl.associative_scan(tl.where(before + 1 == block, 0, n), 1, _larger)
        second = there & ((n - run) % 2 == 1)
        pair = there & ((n - run) % 2 == 0) & (after == block + 1)
        alone = there & ((n - run) % 2 == 0) & (after != block + 1)
        pairs = tl.sum(pair.to(tl.int32), 1)
        # Of a second choice its own pair counts as before it.
        earlier = tl.cumsum(pair.to(tl.int32), 1) - pair.to(tl.int32)
        singles = tl.cumsum(alone.to(tl.int32), 1) - alone.to(tl.int32)
        part = tl.where(pair, earlier, pairs[:, None] + singles)
        choice = tl.where(alone, 2 * pairs[:, None] + singles, 2 * earlier - second.to(tl.int32))
        key = tl.where(pair, block + M, block)
        heads = pair | alone
    taken = taken_ptr + (line * Q + t // size) * (D * M) + key
    rank = tl.atomic_add(taken, 1, mask=heads, sem="relaxed")
    tl.store(key_ptr + into + part, key, mask=heads)
    tl.store(rank_ptr + into + part, rank, mask=heads)
    tl.store(count_ptr + (2 * lines + line) * T + row, pairs, mask=row < T)
    if MOVED:
        nears = tl.load(count_ptr + line * T + row, mask=row < T, other=0)[:, None]
        slot = tl.load(slot_ptr + into + n, mask=there, other=0)
        tl.store(moved_ptr + into + slot, nears + choice, mask=there)


@triton.jit(do_not_specialize=_NUMBERS)
def items_kernel(
    taken_ptr,  # [B HS Q, D, M] int32: parts of a block
    start_ptr,  # the same: parts of lower kinds and blocks
    item_ptr,  # [B HS Q, D, most, 3] int32
    used_ptr,  # [B HS Q, D] int32
    M,
    longest,
    most,
    BM: tl.constexpr,
):
    kind, kinds = tl.program_id(1), tl.num_programs(1)
    line = tl.program_id(0).to(tl.int64)
    taken_ptr += line * kinds * M
    start_ptr += (line * kinds + kind) * M
    item_ptr += (line * kinds + kind) * most * 3
    start = 0
    for low in range(0, kind * M, BM):
        at = low + tl.arange(0, BM)
        start += tl.sum(tl.load(taken_ptr + at, mask=at < kind * M, other=0), 0)
    used = 0
    for low in range(0, M, BM):
        block = low + tl.arange(0, BM)
        count = tl.load(taken_ptr + kind * M + block, mask=block < M, other=0)
        first = start + tl.cumsum(count, 0) - count
        tl.store(start_ptr + block, first, mask=block < M)
        parts = tl.cdiv(count, longest)
        item = item_ptr + (used + tl.cumsum(parts, 0) - parts) * 3
        for part in range(0, tl.max(parts, 0)):
            ok, place = part < parts, first + part * longest
            tl.store(item + part * 3, block, mask=ok)
            tl.store(item + part * 3 + 1, place, mask=ok)
            tl.store(item + part * 3 + 2, tl.minimum(place + longest, first + count), mask=ok)
        start += tl.sum(count, 0)
        used += tl.sum(parts, 0)
    tl.store(used_ptr + line * kinds + kind, used)


@triton.jit(do_not_specialize=_NUMBERS)
def places_kernel(
    key_ptr,
    rank_ptr,  # replaced by the place
    count_ptr,  # [3, B HS, T] int32
    start_ptr,  # [B HS, Q, D, M] int32
    place_ptr,  # [B HS, T N] int32
    T,
    M,
    Q,
    size,
    D: tl.constexpr,
    N: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    line, lines = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    count = tl.load(count_ptr + (lines + line) * T + row, mask=row < T, other=0)
    count -= tl.load(count_ptr + (2 * lines + line) * T + row, mask=row < T, other=0)
    t, n = row[:, None], tl.arange(0, BN)[None, :]
    there = n < count[:, None]
    at = (line * T + t) * N + n
    key = tl.load(key_ptr + at, mask=there, other=0)
    chunk = t // size
    place = tl.load(start_ptr + (line * Q + chunk) * (D * M) + key, mask=there, other=0)
    place += tl.load(rank_ptr + at, mask=there, other=0)
    first = (line * T + chunk * size) * N
    tl.store(place_ptr + first + place, (t - chunk * size) * N + n, mask=there)
    tl.store(rank_ptr + at, place, mask=there)


def split(
    selection: Selection, size: int, least: int, longest: int, moved: bool, paired: bool
) -> Split:
    """The choices of a selection with R = 1 and slots, contiguous, in chunks of `size` queries.

    least: of the UNITED queries of the group before that make a choice near. moved: whether to say
    where slots go. paired: whether two choices can be one part.
    """
    blocks = selection.blocks_BHQN
    batch, groups, queries, slots = blocks.shape
    chunks, kinds = ceil_div(queries, size), 1 + paired
    n_blocks = ceil_div(selection.n_keys, selection.spec.key_block)
    most = min(n_blocks, size * slots) + size * slots // longest

    def table(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=blocks.device)

    near, far, keys, places = (table(*blocks.shape) for _ in range(4))
    rank = torch.full_like(blocks, -1)
    counts = table(3, *blocks.shape[:3])
    per_chunk = (batch, groups, chunks, kinds)
    items, used, start = table(*per_chunk, most, 3), table(*per_chunk), table(*per_chunk, n_blocks)
    where = torch.empty_like(blocks, dtype=torch.int64) if moved else None
    slot = table(*blocks.shape) if moved else near
    taken = torch.zeros_like(start)
    bn = power_of_2(slots)
    bt = max(1, min(16, 512 // bn))
    grid = (ceil_div(queries, bt), batch * groups)
    run(
        split_kernel, grid,
        blocks, near, far, slot, near if where is None else where, counts,
        queries, selection.q_start, least,
        N=slots, UNITED=UNITED, MOVED=moved, STEPS=slots.bit_length(), BT=bt, BN=bn,
    )  # fmt: skip
    run(
        pair_kernel, grid,
        far, slot, near if where is None else where, keys, rank, taken, counts,
        queries, n_blocks, chunks, size,
        N=slots, PAIRED=paired, MOVED=moved, BT=bt, BN=bn,
    )  # fmt: skip
    run(
        items_kernel, (batch * groups * chunks, kinds),
        taken, start, items, used, n_blocks, longest, most,
        BM=min(1024, max(16, power_of_2(n_blocks))),
    )  # fmt: skip
    run(
        places_kernel, grid,
        keys, rank, counts, start, places, queries, n_blocks, chunks, size,
        D=kinds, N=slots, BT=bt, BN=bn,
    )  # fmt: skip
    rest = replace(selection, blocks_BHQN=near)
    return Split(rest, size, places.flatten(2), rank, items, used, counts, where)
