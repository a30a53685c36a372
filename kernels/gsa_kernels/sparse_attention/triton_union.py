"""Unions of neighbouring queries' lists, so that a tensor core has rows enough to work on.

A group of 16 or 32 queries marks its choices in a bit map with as many bits per key block; one
sweep of the map then writes the blocks that anybody chose, in order, with the bits that say who
did. Sizes are static and the host never waits, so a union has room for as many whole lists: long
ones are made, used and let go for some groups at a time (`parts`), and scratch is bounded.

Legend: see triton_forward.py; U slots of a union. A sweep reads S / C x 2 bytes per group.

The pairs (query, key) of a group are numbered in the order of its union, and of the queries within
one key: a pair's number is the set bits of all earlier entries plus those of lower queries.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from gsa_kernels.launch import run
from gsa_kernels.selection import Selection
from gsa_kernels.sizes import ceil_div, power_of_2

UNITED = 16  # queries of a group; 32 where asked for, without numbers of pairs
OWNED = 64  # keys of the blocks that `blocks_BHUJ2` counts in, see triton_token.py
_SCRATCH = 3 << 27  # bytes of unions and maps at a time
_SWEPT = 1024  # blocks swept at a time, a multiple of OWNED


@dataclass(frozen=True)
class Unions:
    """lists_BHUN: ascending key blocks that any of a group's queries chose, undefined past
    counts_BHU. bits_BHUN: bit r is set where query r of the group chose the block.

    For single keys (C = 1) the sinks of each query count as chosen by it. starts_BHUJ2, where it
    was asked for, holds for every OWNED keys up to the group's last query how many entries of the
    union and how many set bits lie before them. All int32.
    """

    lists_BHUN: Tensor
    bits_BHUN: Tensor
    counts_BHU: Tensor
    starts_BHUJ2: Tensor | None


@triton.jit
def ones(x):
    """Set bits of the low 16 bits of x."""
    x = x - ((x >> 1) & 0x5555)
    x = (x & 0x3333) + ((x >> 2) & 0x3333)
    x = (x + (x >> 4)) & 0x0F0F
    return (x + (x >> 8)) & 0x1F


@triton.jit
def unchosen(bits, query):
    """Negative and above -2^23, by its upper bits, where bit `query` is not set; else below 2^23.
    No comparison: see mask_of in triton_forward.py."""
    return (~bits << (31 - query)) >> 8


@triton.jit
def pair_number(before, bits, query):
    """Number of the pair (query, key): `before` it lie the pairs of lower keys. Broadcasts."""
    return before + ones(bits & ((1 << query) - 1))


@triton.jit
def pair_numbers(before, bits, query):
    """[rows, keys] numbers of a step's pairs, and `before` for the next step."""
    each = ones(bits)
    first = before + tl.cumsum(each, 0) - each
    return pair_number(first[None, :], bits[None, :], query[:, None]), before + tl.sum(each, 0)


@triton.jit
def sink_range(docs_ptr, b, position, ok, S, WINDOW: tl.constexpr, SINKS: tl.constexpr,
               HAS_DOCS: tl.constexpr):  # fmt: skip
    """[first, end) of the sinks of single queries that lie before their local windows (C = 1)."""
    first = position * 0
    if HAS_DOCS:
        first = tl.load(docs_ptr + b.to(tl.int64) * S + position, mask=ok, other=0)
    end = tl.minimum(first + SINKS, tl.maximum(position - WINDOW + 1, 0))
    return first, tl.maximum(end, first)


@triton.jit
def mark_kernel(
    blocks_ptr,  # [B, HS, T, N] int32
    map_ptr,  # [groups of this launch, WORDS] int32: GROUP bits per block, two or one a word
    docs_ptr,
    first,  # of all groups of all sequences and heads
    n_groups,  # of one sequence and head
    first_group,  # number of the first, of positions from 0
    T,
    S,
    N,
    WORDS,
    q_start,
    HS: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,  # keys; 0: marks none
    MOST: tl.constexpr,  # SINKS rounded up to a power of two
    HAS_DOCS: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
):
    PER: tl.constexpr = 32 // GROUP
    flat = first + tl.program_id(0)
    line, group = flat // n_groups, flat % n_groups
    row = tl.arange(0, GROUP)
    position = (first_group + group) * GROUP + row
    t = position - q_start
    ok = (t >= 0) & (t < T)
    into = map_ptr + tl.program_id(0).to(tl.int64) * WORDS
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    at = (line.to(tl.int64) * T + t) * N
    there = ok[:, None] & (n < N)[None, :]
    block = tl.load(blocks_ptr + at[:, None] + n[None, :], mask=there, other=-1)
    bit = tl.full([GROUP, BN], 1, tl.int32) << (block % PER * GROUP + row[:, None])
    tl.atomic_or(into + block // PER, bit, mask=block >= 0, sem="relaxed")
    if SINKS > 0:
        if tl.program_id(1) == 0:
            low, end = sink_range(docs_ptr, line // HS, position, ok, S, WINDOW, SINKS, HAS_DOCS)
            sink = low[:, None] + tl.arange(0, MOST)[None, :]
            mark = tl.full([GROUP, MOST], 1, tl.int32) << (sink % PER * GROUP + row[:, None])
            is_sink = ok[:, None] & (sink < end[:, None])
            tl.atomic_or(into + sink // PER, mark, mask=is_sink, sem="relaxed")


@triton.jit
def sweep_kernel(
    map_ptr,  # [groups of this launch, PER WORDS] int16 or int32
    list_ptr,  # [groups, U] int32
    bits_ptr,
    count_ptr,  # [groups] int32
    start_ptr,  # [groups, J, 2] int32, where STARTS
    first,
    n_groups,
    first_group,
    n_blocks,
    WORDS,
    U,
    J,
    C: tl.constexpr,
    OWNED: tl.constexpr,
    STARTS: tl.constexpr,  # GROUP 16 only
    GROUP: tl.constexpr,
    BS: tl.constexpr,
):
    PER: tl.constexpr = 32 // GROUP
    flat = first + tl.program_id(0)
    last = (first_group + flat % n_groups) * GROUP + GROUP - 1
    limit = tl.minimum(n_blocks, last // C + 1)
    read = map_ptr + tl.program_id(0).to(tl.int64) * WORDS * PER
    into = flat.to(tl.int64) * U
    count = 0
    chosen = 0
    for low in range(0, limit, BS):
        block = low + tl.arange(0, BS)
        bits = tl.load(read + block, mask=block < limit, other=0).to(tl.int32)
        if GROUP == 16:
            bits = bits & 0xFFFF
        hit = (bits != 0).to(tl.int32)
        place = count + tl.cumsum(hit, 0) - hit
        tl.store(list_ptr + into + place, block, mask=hit != 0)
        tl.store(bits_ptr + into + place, bits, mask=hit != 0)
        if STARTS:
            each = ones(bits)
            before = chosen + tl.cumsum(each, 0) - each
            at = start_ptr + (flat.to(tl.int64) * J + block // OWNED) * 2
            edge = (block % OWNED == 0) & (block < limit)
            tl.store(at, place, mask=edge)
            tl.store(at + 1, before, mask=edge)
            chosen += tl.sum(each, 0)
        count += tl.sum(hit, 0)
    tl.store(count_ptr + flat, count)


def _width(selection: Selection, group: int) -> tuple[int, int, int]:
    """(slots of a union, key blocks, sinks that it holds)."""
    spec = selection.spec
    sinks = spec.sinks if spec.key_block == 1 else 0
    n_blocks = ceil_div(selection.n_keys, spec.key_block)
    width = min(group * (selection.blocks_BHQN.shape[3] + sinks), n_blocks)
    return width, n_blocks, sinks


@cache
def _waves(device: torch.device) -> list[int]:
    """Programs that run at a time where 4, 3, 2 or 1 fit a multiprocessor, multiples of 16."""
    if device.type != "cuda":
        return [16]
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return [max(16, n * processors // 16 * 16) for n in (4, 3, 2, 1)]


def parts(
    selection: Selection,
    pairs: int,
    whole: bool = False,
    group: int = UNITED,
    scratch: int | None = None,
) -> list[tuple[int, int]]:
    """(first group, how many) of unions to make at a time, for which `pairs` more numbers per
    group are held. whole: all. group: queries of one. scratch: most bytes of a part."""
    batch, heads, queries, _ = selection.blocks_BHQN.shape
    groups = ceil_div(selection.q_start % group + queries, group)
    width, n_blocks, _ = _width(selection, group)
    each = 4 * batch * heads * (2 * width + ceil_div(n_blocks, 32 // group) + pairs)
    # Full waves: a few programs left over would take as long again. Equal parts, of multiples of
    # 16: kernels are compiled anew for other divisors.
    room = (scratch or _SCRATCH) // each
    wave = next((n for n in _waves(selection.blocks_BHQN.device) if n <= room), 16)
    n = 1 if whole else ceil_div(groups, max(16, room // wave * wave))
    size = ceil_div(ceil_div(groups, n), 16) * 16 if n > 1 else groups
    return [(first, min(size, groups - first)) for first in range(0, groups, size)]


def unite(
    selection: Selection,
    docs: Tensor | None,
    starts: bool,
    part: tuple[int, int] | None = None,
    group: int = UNITED,
) -> Unions:
    """Unions over groups of 16 or 32 positions of a selection with R = 1; docs: int32. part: of
    these groups (first, how many) only."""
    spec, blocks = selection.spec, selection.blocks_BHQN
    assert not starts or (spec.key_block == 1 and group == UNITED)
    batch, heads, queries, slots = blocks.shape
    first_group, n_groups = part or parts(selection, 0, True, group)[0]
    first_group += selection.q_start // group
    width, n_blocks, sinks = _width(selection, group)

    def table(*shape: int) -> Tensor:
        size = (batch, heads, n_groups, *shape)
        return torch.empty(size, dtype=torch.int32, device=blocks.device)

    lists, bits, counts = table(width), table(width), table()
    owned = ceil_div(n_blocks, OWNED)
    edges = table(owned, 2) if starts else None
    words = ceil_div(n_blocks, 32 // group)
    groups = batch * heads * n_groups
    at_once = min(groups, max(1, _SCRATCH // (words * 4)))
    marks = torch.empty(at_once, words, dtype=torch.int32, device=blocks.device)
    bn = max(16, min(128, power_of_2(slots)))
    for first in range(0, groups, at_once):
        size = min(at_once, groups - first)
        marks.zero_()
        run(
            mark_kernel, (size, max(1, ceil_div(slots, bn))),
            blocks, marks, counts if docs is None else docs, first, n_groups, first_group,
            queries, selection.n_keys, slots, words, selection.q_start,
            HS=heads, WINDOW=spec.window, SINKS=sinks, MOST=power_of_2(max(1, sinks)),
            HAS_DOCS=docs is not None, GROUP=group, BN=bn,
        )  # fmt: skip
        run(
            sweep_kernel, (size, 1),
            marks.view(torch.int16) if group == 16 else marks, lists, bits, counts,
            counts if edges is None else edges,
            first, n_groups, first_group, n_blocks, words, width, owned,
            C=spec.key_block, OWNED=OWNED, STARTS=starts, GROUP=group,
            BS=min(_SWEPT, power_of_2(max(OWNED, n_blocks))),
        )  # fmt: skip
    return Unions(lists, bits, counts, edges)
