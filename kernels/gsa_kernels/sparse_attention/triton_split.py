"""Near and far choices of single queries (R = 1), and the far ones by key block.

A choice is near where enough queries of the group before made it: such a block is worth fetching
for a whole group, which the union tiles do. One answer holds for a group, and later queries are
never asked, so what a row is computed from, and in which order, does not depend on them. Far
choices are listed by key block, for programs that keep a block and gather its queries (see
triton_gather.py).

Queries go in chunks, each with lists of its own, all made in the same launches. Sizes are static
and the host never waits. A far choice takes its place in its block's list by an atomic count: the
order inside a list is not defined, and no result of the forward depends on it.

Legend: B batch, HS selection heads, T queries, N slots of a query, C keys per block, Q chunks, M
key blocks.
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
    """near: the selection without its far choices. places_BHL: the far choices of chunk after
    chunk, by key block, each as t N + n for query t of the chunk and its n-th far choice; chunk i
    begins at i size N. entries_BHTN: where in its chunk's places each far choice is, -1 past the
    last. items_BHQM3: a key block and the places [first, last) of up to `longest` of its choices;
    used_BHQ says how many there are. counts_2BHT: near and far choices.

    moved_BHTN, where it was asked for: where a slot of the selection is now, near ones from 0 and
    far ones after them; int64. All else int32.
    """

    near: Selection
    size: int
    places_BHL: Tensor
    entries_BHTN: Tensor
    items_BHQM3: Tensor
    used_BHQ: Tensor
    counts_2BHT: Tensor
    moved_BHTN: Tensor | None


@triton.jit(do_not_specialize=_NUMBERS)
def split_kernel(
    block_ptr,  # [B HS, T, N] int32
    near_ptr,  # the same
    far_ptr,  # the same
    rank_ptr,  # the same: number of a far choice in the list of its block and chunk
    moved_ptr,  # the same, int64; only where MOVED
    taken_ptr,  # [B HS, Q, M] int32, zero: choices of a block
    count_ptr,  # [2, B HS, T] int32
    T,
    M,
    Q,
    q_start,
    size,
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
    taken = taken_ptr + (line * Q + t // size) * M + block
    rank = tl.atomic_add(taken, 1, mask=far != 0, sem="relaxed")
    tl.store(rank_ptr + first + into + before_far, rank, mask=far != 0)
    tl.store(count_ptr + line * T + row, nears, mask=row < T)
    tl.store(count_ptr + (tl.num_programs(1) + line) * T + row, fars, mask=row < T)
    if MOVED:
        place = tl.where(near != 0, before_near, nears[:, None] + before_far)
        tl.store(moved_ptr + first + at, tl.where(there, place, n), mask=ok)


@triton.jit(do_not_specialize=_NUMBERS)
def items_kernel(
    taken_ptr,  # [B HS Q, M] int32: choices of a block, replaced by those of lower blocks
    item_ptr,  # [B HS Q, most, 3] int32
    used_ptr,  # [B HS Q] int32
    M,
    longest,
    most,
    BM: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    start = 0
    used = 0
    for low in range(0, M, BM):
        block = low + tl.arange(0, BM)
        at = taken_ptr + line * M + block
        count = tl.load(at, mask=block < M, other=0)
        first = start + tl.cumsum(count, 0) - count
        tl.store(at, first, mask=block < M)
        parts = tl.cdiv(count, longest)
        item = item_ptr + (line * most + used + tl.cumsum(parts, 0) - parts) * 3
        for part in range(0, tl.max(parts, 0)):
            ok, place = part < parts, first + part * longest
            tl.store(item + part * 3, block, mask=ok)
            tl.store(item + part * 3 + 1, place, mask=ok)
            tl.store(item + part * 3 + 2, tl.minimum(place + longest, first + count), mask=ok)
        start += tl.sum(count, 0)
        used += tl.sum(parts, 0)
    tl.store(used_ptr + line, used)


@triton.jit(do_not_specialize=_NUMBERS)
def places_kernel(
    far_ptr,
    rank_ptr,  # replaced by the place
    count_ptr,  # [B HS, T] int32: far choices
    start_ptr,  # [B HS, Q, M] int32: choices of lower blocks
    place_ptr,  # [B HS, T N] int32
    T,
    M,
    Q,
    size,
    N: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    line = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    count = tl.load(count_ptr + line * T + row, mask=row < T, other=0)
    t, n = row[:, None], tl.arange(0, BN)[None, :]
    there = n < count[:, None]
    at = (line * T + t) * N + n
    block = tl.load(far_ptr + at, mask=there, other=0)
    chunk = t // size
    place = tl.load(start_ptr + (line * Q + chunk) * M + block, mask=there, other=0)
    place += tl.load(rank_ptr + at, mask=there, other=0)
    first = (line * T + chunk * size) * N
    tl.store(place_ptr + first + place, (t - chunk * size) * N + n, mask=there)
    tl.store(rank_ptr + at, place, mask=there)


def split(selection: Selection, size: int, least: int, longest: int, moved: bool) -> Split:
    """The choices of a selection with R = 1 and slots, contiguous, in chunks of `size` queries.

    least: of the UNITED queries of the group before that make a choice near. moved: whether to say
    where slots go.
    """
    blocks = selection.blocks_BHQN
    batch, groups, queries, slots = blocks.shape
    chunks = ceil_div(queries, size)
    n_blocks = ceil_div(selection.n_keys, selection.spec.key_block)
    most = min(n_blocks, size * slots) + size * slots // longest

    def table(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=blocks.device)

    near, far, places = (table(*blocks.shape) for _ in range(3))
    rank = torch.full_like(blocks, -1)
    counts, used = table(2, *blocks.shape[:3]), table(batch, groups, chunks)
    items = table(batch, groups, chunks, most, 3)
    where = torch.empty_like(blocks, dtype=torch.int64) if moved else None
    taken = torch.zeros(batch, groups, chunks, n_blocks, dtype=torch.int32, device=blocks.device)
    bn = power_of_2(slots)
    bt = max(1, min(16, 512 // bn))
    grid = (ceil_div(queries, bt), batch * groups)
    run(
        split_kernel, grid,
        blocks, near, far, rank, near if where is None else where, taken, counts,
        queries, n_blocks, chunks, selection.q_start, size, least,
        N=slots, UNITED=UNITED, MOVED=moved, STEPS=slots.bit_length(), BT=bt, BN=bn,
    )  # fmt: skip
    run(
        items_kernel, (batch * groups * chunks,),
        taken, items, used, n_blocks, longest, most,
        BM=min(1024, max(16, power_of_2(n_blocks))),
    )  # fmt: skip
    run(
        places_kernel, grid,
        far, rank, counts[1], taken, places, queries, n_blocks, chunks, size,
        N=slots, BT=bt, BN=bn,
    )  # fmt: skip
    rest = replace(selection, blocks_BHQN=near)
    return Split(rest, size, places.flatten(2), rank, items, used, counts, where)
