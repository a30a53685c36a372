"""Query gathering: a program takes a key block and the queries that chose it.

A choice is near where `united` or more of a group of 16 neighbours made it, else far. Near ones,
the sinks and the window go to the union tiles of sparse_attention, which fetch a block once for
the whole group. For far ones the lists are inverted: a program keeps a block's keys and values and
gathers its queries, writes for each (query, head) a softmax over the block alone, divided by its
own sum, and the log of that sum. A last kernel weighs these parts of a row, and what the union
tiles gave, by their sums. No atomics; the order of additions is that of a query's own list.

Queries go in chunks, so that the parts stay small. All chunks are inverted in one call, as if they
were sequences of a batch; the host never waits.

Legend: B batch, T queries, S keys, H query heads, K key-value heads, G = H / K, E head width,
HS selection heads, N slots of a query, C keys per block, Q chunks, L list entries of a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from gsa_kernels.launch import run
from gsa_kernels.selection import Selection, SelectionSpec
from gsa_kernels.sizes import ceil_div, padded, power_of_2
from gsa_kernels.sparse_attention import sparse_attention
from gsa_kernels.sparse_attention.triton_inverted import invert
from gsa_kernels.sparse_attention.triton_launch import LOG2E
from gsa_kernels.sparse_attention.triton_union import UNITED


@dataclass(frozen=True)
class Tuning:
    """chunk: queries whose parts are held at once; together: of so many key-value heads (0: all).
    lanes: streams that take chunks in turn, each with parts of its own, so that one fills the
    other's tails. united: neighbours of 16 that make a choice near; 17: none is.
    longest: queries of an item. rows, warps, stages: of a step of the gathering; registers: of a
    thread; resident: programs on a multiprocessor. streamed: blocks leave the L2 before parts do.
    merged: rows of a program that merges."""

    chunk: int = 2048
    together: int = 1
    lanes: int = 1
    united: int = 8
    longest: int = 128
    rows: int = 64
    warps: int = 4
    stages: int = 3
    registers: int = 168
    resident: int = 3
    streamed: bool = False
    merged: int = 32


@dataclass(frozen=True)
class Lists:
    """near: what is left to the union tiles. far [B Q, HS, size, N]: the other choices, ascending,
    padded with -1. places [B Q, HS, L]: t N + n for the query t of the chunk and its slot n, by
    key block. items [B Q, HS, M, 4]: block, places [first, last) and a number, longest first;
    used [B Q, HS]: how many there are. int32."""

    near: Selection
    far: Tensor
    places: Tensor
    items: Tensor
    used: Tensor
    chunks: int


# Compiled once for all their values.
NUMBERS = tuple("T S L M PADDED q_start least chunks chunk size together first_head".split())


@triton.jit(do_not_specialize=NUMBERS)
def split_kernel(
    block_ptr,  # [B HS, T, N] int32
    near_ptr,  # the same
    far_ptr,  # [B HS, T up to whole chunks, N] int32
    T,
    PADDED,
    q_start,
    least,
    N: tl.constexpr,
    BN: tl.constexpr,
    UNITED: tl.constexpr,
):
    """One program per group: how many of its lists hold each entry, and two lists of each."""
    line = tl.program_id(1).to(tl.int64)
    first = (q_start // UNITED + tl.program_id(0)) * UNITED - q_start
    t = first + tl.arange(0, UNITED)[:, None]
    n = tl.arange(0, BN)[None, :]
    ok = (t >= 0) & (t < T)
    read = block_ptr + line * T * N
    block = tl.load(read + t * N + n, mask=ok & (n < N), other=-1)
    chose = tl.zeros([UNITED, BN], tl.int32)
    low = tl.maximum(first, 0)
    for other in tl.range(low * N, tl.minimum(first + UNITED, T) * N, loop_unroll_factor=4):
        chose += (block == tl.load(read + other)).to(tl.int32)
    near = ((chose >= least) & (block >= 0)).to(tl.int32)
    far = ((chose < least) & (block >= 0)).to(tl.int32)
    at, before = near_ptr + line * T * N + t * N, tl.cumsum(near, 1) - near
    tl.store(at + before, block, mask=near != 0)
    tl.store(at + n, -1, mask=ok & (n < N) & (n >= tl.sum(near, 1)[:, None]))
    at, before = far_ptr + line * PADDED * N + t * N, tl.cumsum(far, 1) - far
    tl.store(at + before, block, mask=far != 0)
    tl.store(at + n, -1, mask=ok & (n < N) & (n >= tl.sum(far, 1)[:, None]))


@triton.jit
def load_item(item_ptr, turn, used):
    """(block, first, last) of a program's next item; first = last if there is none. The longest
    come first: who takes a long one in one turn gets a short one in the next."""
    programs, i = tl.num_programs(0), tl.program_id(0)
    item = turn * programs + tl.where(turn % 2 == 0, i, programs - 1 - i)
    at, ok = item_ptr + item * 4, item < used
    first, last = tl.load(at + 1, mask=ok, other=0), tl.load(at + 2, mask=ok, other=0)
    return tl.load(at, mask=ok, other=0), first, last


@triton.jit(do_not_specialize=NUMBERS)
def gather_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    docs_ptr,  # [B, S] int32
    place_ptr,  # [B Q, HS, L] int32
    item_ptr,  # [B Q, HS, M, 4] int32
    used_ptr,  # [B Q, HS] int32
    part_ptr,  # [B, together, size, N, G, E]
    sum_ptr,  # [B, together, size, N, G] float32: log2 of a sum of exponentials
    T,
    S,
    q_start,
    L,
    M,
    chunks,
    chunk,
    size,
    together,
    first_head,
    scale_log2,
    H: tl.constexpr,
    K: tl.constexpr,
    HS: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    STREAMED: tl.constexpr,
    STAGES: tl.constexpr,
):
    G: tl.constexpr = H // K
    EACH: tl.constexpr = BM // G  # queries of a step
    b, kv_head = tl.program_id(1) // together, first_head + tl.program_id(1) % together
    line = (b * chunks + chunk).to(tl.int64) * HS + (kv_head if HS > 1 else 0)
    used = tl.load(used_ptr + line)
    item_ptr += line * M * 4
    place_ptr += line * L
    part_ptr += tl.program_id(1).to(tl.int64) * size * (N * G * E)
    sum_ptr += tl.program_id(1).to(tl.int64) * size * (N * G)
    q_ptr += ((b.to(tl.int64) * T + chunk * size) * H + kv_head * G) * E
    base = (b.to(tl.int64) * S * K + kv_head) * E
    m, e, c = tl.arange(0, BM), tl.arange(0, BE), tl.arange(0, C)
    g = m % G
    block, first, last = load_item(item_ptr, 0, used)
    for turn in range(0, tl.cdiv(used, tl.num_programs(0))):
        # Already now: a program would wait for it.
        following = load_item(item_ptr, turn + 1, used)
        key = block * C + c
        rows = base + key.to(tl.int64)[:, None] * (K * E) + e
        key_ok = (key < tl.where(first < last, S, 0))[:, None] & (e < E)
        policy: tl.constexpr = "evict_first" if STREAMED else ""
        k = tl.load(k_ptr + rows, mask=key_ok, other=0.0, eviction_policy=policy)
        v = tl.load(v_ptr + rows, mask=key_ok, other=0.0, eviction_policy=policy)
        for step in tl.range(0, tl.cdiv(last - first, EACH), num_stages=STAGES):
            place = first + step * EACH + m // G
            there = (place < last) & (m < EACH * G)
            slot = tl.load(place_ptr + place, mask=there, other=0)
            t = slot // N
            ok = there[:, None]
            if BE != E:
                ok = ok & (e < E)
            q = tl.load(q_ptr + (t * H + g)[:, None] * E + e, mask=ok, other=0.0)
            s = tl.dot(q, k.T, input_precision="ieee")
            if HAS_DOCS:
                at = b.to(tl.int64) * S + q_start + chunk * size + t
                start = tl.load(docs_ptr + at, mask=there, other=0)
                s = tl.where(key[None, :] >= start[:, None], s, float("-inf"))
            top = tl.max(s, 1) * scale_log2
            if HAS_DOCS:  # a choice may lie in another document
                top = tl.where(top == float("-inf"), 0.0, top)
            p = tl.exp2(s * scale_log2 - top[:, None])
            total = tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, input_precision="ieee")
            each = 1.0 / (tl.where(total > 0, total, 1.0) if HAS_DOCS else total)
            out = (out * each[:, None]).to(part_ptr.dtype.element_ty)
            row = slot * G + g
            tl.store(part_ptr + row[:, None] * E + e, out, mask=ok)
            tl.store(sum_ptr + row, top + tl.log2(total), mask=there)
        block, first, last = following


@triton.jit(do_not_specialize=NUMBERS)
def merge_kernel(
    far_ptr,  # [B Q, HS, size, N] int32
    part_ptr,
    sum_ptr,
    out_ptr,  # [B, T, H, E]: of the union tiles, replaced by the result
    lse_ptr,  # [B, H, T] float32, natural log: the same
    T,
    chunks,
    chunk,
    size,
    together,
    first_head,
    H: tl.constexpr,
    K: tl.constexpr,
    HS: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    N: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    G: tl.constexpr = H // K
    EACH: tl.constexpr = BM // G
    b, kv_head = tl.program_id(1) // together, first_head + tl.program_id(1) % together
    line = (b * chunks + chunk).to(tl.int64) * HS + (kv_head if HS > 1 else 0)
    part_ptr += tl.program_id(1).to(tl.int64) * size * (N * G * E)
    sum_ptr += tl.program_id(1).to(tl.int64) * size * (N * G)
    m, e, n = tl.arange(0, BM), tl.arange(0, BE), tl.arange(0, BN)
    t = tl.program_id(0) * EACH + m // G
    ok = (m < EACH * G) & (t < size) & (chunk * size + t < T)
    wide = ok[:, None] & (e < E)
    head = kv_head * G + m % G
    lse_ptr += (b.to(tl.int64) * H + head) * T + chunk * size + t
    out_ptr += (((b.to(tl.int64) * T + chunk * size + t) * H + head) * E)[:, None] + e
    far = tl.load(
        far_ptr + (line * size + t)[:, None] * N + n, mask=ok[:, None] & (n < N), other=-1
    )
    at = t * (N * G) + m % G
    sums = tl.load(sum_ptr + at[:, None] + n * G, mask=far >= 0, other=float("-inf"))
    own = tl.load(lse_ptr, mask=ok, other=0.0) * 1.4426950408889634
    top = tl.maximum(tl.max(sums, 1), own)
    count = tl.sum((far >= 0).to(tl.int32), 1)
    weight = tl.exp2(own - top)
    total = weight + tl.sum(tl.exp2(sums - top[:, None]), 1)
    acc = tl.load(out_ptr, mask=wide, other=0.0).to(tl.float32) * weight[:, None]
    for i in tl.range(0, tl.max(count, 0), loop_unroll_factor=4):
        there = i < count
        weight = tl.exp2(tl.load(sum_ptr + at + i * G, mask=there, other=float("-inf")) - top)
        x = tl.load(
            part_ptr + (at + i * G)[:, None] * E + e, mask=there[:, None] & wide, other=0.0
        )
        acc += x.to(tl.float32) * weight[:, None]
    tl.store(out_ptr, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=wide)
    tl.store(lse_ptr, (top + tl.log2(total)) * 0.6931471805599453, mask=ok)


def make_lists(selection: Selection, tuning: Tuning) -> Lists:
    """Near and far choices, and the items of the far ones."""
    spec, blocks = selection.spec, selection.blocks_BHQN.contiguous()
    batch, groups, queries, slots = blocks.shape
    size = min(tuning.chunk, queries)
    chunks = ceil_div(queries, size)
    near, far = blocks[..., :0], F.pad(blocks, (0, 0, 0, chunks * size - queries), value=-1)
    if tuning.united <= UNITED:
        near = torch.empty_like(blocks)
        far = blocks.new_full((batch, groups, chunks * size, slots), -1)
        start = selection.q_start
        run(
            split_kernel,
            (ceil_div(start + queries, UNITED) - start // UNITED, batch * groups),
            blocks, near, far, queries, chunks * size, start, tuning.united,
            N=slots, BN=power_of_2(max(1, slots)), UNITED=UNITED,
        )  # fmt: skip
    far = far.unflatten(2, (chunks, size)).transpose(1, 2).flatten(0, 1).contiguous()
    # Without sinks, and so without documents, it does not matter where a chunk lies.
    plain = SelectionSpec(spec.key_block, 1, heads=groups)
    lists = invert(Selection(plain, far, size, selection.n_keys), tuning.longest, True)
    assert lists.places_BHL is not None
    segments = lists.segments_BHG4
    length = segments[..., 2] - segments[..., 1]
    length = length.masked_fill(segments[..., 0] < 0, 0)
    order = length.argsort(-1, descending=True)
    items = segments.gather(2, order[..., None].expand_as(segments))
    used = (length > 0).sum(-1, dtype=torch.int32)
    near_selection = replace(selection, blocks_BHQN=near)
    return Lists(near_selection, far, lists.places_BHL, items, used, chunks)


def near_keys(
    q: Tensor, k: Tensor, v: Tensor, near: Selection, scale: float | None, impl: str
) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, E], lse [B, H, T]) of what the union tiles attend."""
    result = sparse_attention(q, k, v, near, scale=scale, need_lse=True, impl=impl)
    assert result.lse_BTH is not None
    lse = result.lse_BTH.transpose(1, 2).to(torch.float32).contiguous()
    return result.out_BTHE.contiguous(), lse


def passes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: Lists,
    tuning: Tuning,
    scale: float | None = None,
) -> list[tuple[Callable[[], None], Callable[[], None]]]:
    """The launches (gather, merge) of one chunk after another, head by head. Pass i + lanes uses
    the memory of pass i, so must come after it. All merges together turn out and lse, those of the
    near keys, into the result."""
    (batch, queries, heads, width), keys, kv_heads = q.shape, k.shape[1], k.shape[2]
    group, (groups, size, slots) = heads // kv_heads, lists.far.shape[1:]
    if not slots:
        return []
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    scale = width**-0.5 if scale is None else scale
    if scale < 0:  # the kernel takes the largest product for the largest logit
        q, scale = -q, -scale
    together = min(tuning.together or kv_heads, kv_heads)
    if kv_heads % together:
        raise ValueError(f"{kv_heads} key-value heads do not go {together} at a time")
    if size * max(slots * group, heads) * width >= 1 << 31:  # offsets inside a chunk
        raise ValueError(f"chunks of {size} queries are too long for {slots} slots")
    docs, q_start = lists.near.doc_start_BS, lists.near.q_start
    docs = None if docs is None else docs.to(torch.int32).contiguous()
    shape = (tuning.lanes, batch, together, size, slots, group)
    parts = torch.empty(*shape, width, device=q.device, dtype=q.dtype).unbind()
    sums = torch.empty(shape, device=q.device, dtype=torch.float32).unbind()
    most, across = lists.items.shape[2], batch * together
    programs = min(most, ceil_div(tuning.resident * _processors(q.device), across))
    constants = dict(H=heads, K=kv_heads, HS=groups, E=width, BE=padded(width), N=slots)
    bound = max(scale, 1e-30) * LOG2E

    def gather(lane: int, chunk: int, head: int) -> None:
        run(
            gather_kernel, (programs, across),
            q, k, v, lists.far if docs is None else docs, lists.places, lists.items, lists.used,
            parts[lane], sums[lane], queries, keys, q_start, lists.places.shape[2], most,
            lists.chunks, chunk, size, together, head, bound,
            **constants, C=lists.near.spec.key_block, BM=tuning.rows, HAS_DOCS=docs is not None,
            STREAMED=tuning.streamed, STAGES=tuning.stages,
            num_warps=tuning.warps, maxnreg=tuning.registers,
        )  # fmt: skip

    def merge(lane: int, chunk: int, head: int) -> None:
        run(
            merge_kernel, (ceil_div(size, tuning.merged // group), across),
            lists.far, parts[lane], sums[lane], out, lse, queries, lists.chunks, chunk, size,
            together, head, **constants, BN=power_of_2(slots), BM=tuning.merged,
        )  # fmt: skip

    # Chunks of one head in turn: neighbours choose the same blocks, still in the L2 then.
    order = enumerate(product(range(0, kv_heads, together), range(lists.chunks)))
    lanes = tuning.lanes
    return [
        (partial(gather, i % lanes, chunk, head), partial(merge, i % lanes, chunk, head))
        for i, (head, chunk) in order
    ]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    tuning: Tuning,
    scale: float | None = None,
    impl: str = "triton",
) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, E], lse [B, T, H] float32, natural log) as sparse_attention gives them, but
    without a gradient.

    impl: of the near keys. Raises ValueError unless each query chooses alone (R = 1) blocks of 16,
    32, 64 or 128 keys and the heads of a group fit the rows of a step."""
    spec, group = selection.spec, q.shape[2] // k.shape[2]
    if spec.query_tile != 1 or spec.key_block not in (16, 32, 64, 128):
        raise ValueError(
            "query gathering takes R = 1 and C = 16, 32, 64 or 128, "
            f"not R = {spec.query_tile} and C = {spec.key_block}"
        )
    if group > min(tuning.rows, tuning.merged):
        raise ValueError(f"{group} heads of a group do not fit the rows of {tuning}")
    lists = make_lists(selection, tuning)
    out, lse = near_keys(q, k, v, lists.near, scale, impl)
    launch(passes(q, k, v, out, lse, lists, tuning, scale), q.device, tuning.lanes)
    return out, lse.transpose(1, 2)


def launch(
    found: list[tuple[Callable[[], None], Callable[[], None]]], device: torch.device, lanes: int
) -> None:
    """All passes, by turns on `lanes` streams, for which the current stream then waits."""
    if device.type != "cuda" or lanes == 1:
        for gather, merge in found:
            gather()
            merge()
        return
    current, streams = torch.cuda.current_stream(device), _streams(device, lanes)
    for stream in streams:
        stream.wait_stream(current)
    for i, (gather, merge) in enumerate(found):
        with torch.cuda.stream(streams[i % lanes]):
            gather()
            merge()
    for stream in streams:
        current.wait_stream(stream)


@cache
def _streams(device: torch.device, lanes: int) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(lanes)]


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors; 2 where there is no GPU, so that a program takes several items there."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
