"""Backward of chosen blocks where each query chooses alone (R = 1), by query gathering.

A program keeps the keys and values of a block and gathers the queries that chose it, so that no
pair is computed in vain. It adds up the block's dk, dv and writes for every (query, head) the
block's part of dq; a second kernel adds up the parts of a query in the order of its own list.
Sinks and windows are left to triton_backward.py.

Legend: see triton_forward.py; gather_lists.py for the lists of a chunk of queries.
"""

import triton
import triton.language as tl

from .triton_backward import probabilities
from .triton_forward import mask_of

# Compiled once for all their values.
NUMBERS = ("T", "S", "q_start", "L", "M", "chunks", "chunk", "size", "kv_head")


@triton.jit(do_not_specialize=NUMBERS)
def parts_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    sums_ptr,  # [B, T, H, 2] float32: lse in units of log2, delta
    docs_ptr,
    dk_ptr,  # float32 [B, S, K, E], added to
    dv_ptr,
    query_ptr,  # [B X, HS, L] int32
    item_ptr,  # [B X, HS, M, 4] int32
    part_ptr,  # [B, L, G, E]: dq of a block, without the factor `scale`
    T,
    S,
    q_start,
    L,
    M,
    chunks,
    chunk,
    size,
    kv_head,
    scale,
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
    STAGES: tl.constexpr,
):
    """One program per item."""
    G: tl.constexpr = H // K
    EACH: tl.constexpr = BM // G  # queries of a step
    b = tl.program_id(1).to(tl.int64)
    line = (b * chunks + chunk) * HS + (kv_head if HS > 1 else 0)
    item_ptr += (line * M + tl.program_id(0)) * 4
    block, first, last = tl.load(item_ptr), tl.load(item_ptr + 1), tl.load(item_ptr + 2)
    if first < last:
        query_ptr += line * L
        part_ptr += b * L * (G * E)
        # What follows counts from the chunk's first query: offsets of 32 bits.
        start = (b * T + chunk * size) * H + kv_head * G
        q_ptr += start * E
        do_ptr += start * E
        sums_ptr += start * 2
        docs_ptr += b * S + q_start + chunk * size
        m, e, c = tl.arange(0, BM), tl.arange(0, BE), tl.arange(0, C)
        g = m % G
        base = ((b * S + block * C) * K + kv_head) * E
        rows = c[:, None] * (K * E) + e
        if BE == E:  # a chosen block lies before a window, so is whole
            k, v = tl.load(k_ptr + base + rows), tl.load(v_ptr + base + rows)
        else:
            k = tl.load(k_ptr + base + rows, mask=(e < E)[None, :], other=0.0)
            v = tl.load(v_ptr + base + rows, mask=(e < E)[None, :], other=0.0)
        dk = tl.zeros([C, BE], tl.float32)
        dv = tl.zeros([C, BE], tl.float32)
        part_ptr += first * (G * E)
        for step in tl.range(0, tl.cdiv(last - first, EACH), num_stages=STAGES):
            left = (last - first - step * EACH) * G
            if BM % G != 0:
                left = tl.minimum(left, EACH * G)
            there = m < left
            place = first + step * EACH + m // G
            # Rows that are nobody's take a query of the item, and p = 0.
            t = tl.load(query_ptr + tl.minimum(place, last - 1))
            row = (t * H + g)[:, None]
            if BE == E:
                q, do = tl.load(q_ptr + row * E + e), tl.load(do_ptr + row * E + e)
            else:
                q = tl.load(q_ptr + row * E + e, mask=(e < E)[None, :], other=0.0)
                do = tl.load(do_ptr + row * E + e, mask=(e < E)[None, :], other=0.0)
            # Both at once: alone, every thread would load all that its columns need.
            lse, delta = tl.split(tl.load(sums_ptr + row * 2 + tl.arange(0, 2)))
            lse = tl.where(there, lse, float("inf"))
            if HAS_DOCS:
                outside = tl.load(docs_ptr + t)
            # Logits as [keys, rows]: 64 keys fill the tensor cores whatever the rows.
            if HAS_DOCS:
                mask = mask_of(block * C + c[:, None] - outside[None, :])
                s = tl.dot(k, tl.trans(q), mask, input_precision="ieee")
            else:
                s = tl.dot(k, tl.trans(q), input_precision="ieee")
            p = probabilities(s, lse[None, :], 0.0, scale_log2, False)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            ds = (p * (dp - delta[None, :])).to(q.dtype)
            dk = tl.dot(ds, q, dk, input_precision="ieee")
            dq = tl.trans(tl.dot(tl.trans(k), ds, input_precision="ieee"))
            ok = there[:, None]
            if BE != E:
                ok = ok & (e < E)
            into = part_ptr + step * (EACH * G * E)
            tl.store(into + (m[:, None] * E + e), dq.to(part_ptr.dtype.element_ty), mask=ok)
        ok = (c < C)[:, None] & (e < E)
        dk_ptr, dv_ptr = dk_ptr + base, dv_ptr + base
        tl.atomic_add(dk_ptr + rows, dk * scale, mask=ok, sem="relaxed")
        tl.atomic_add(dv_ptr + rows, dv, mask=ok, sem="relaxed")


@triton.jit(do_not_specialize=NUMBERS)
def sum_kernel(
    place_ptr,  # [B X, HS, size, N] int32, -1 past the end of a query's list
    part_ptr,
    dq_ptr,  # [B, T, H, E]: of sinks and windows, added to
    T,
    chunks,
    chunk,
    size,
    kv_head,
    scale,
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
    b = tl.program_id(1).to(tl.int64)
    line = (b * chunks + chunk) * HS + (kv_head if HS > 1 else 0)
    part_ptr += b * size * (N * G * E)
    place_ptr += line * size * N
    dq_ptr += ((b * T + chunk * size) * H + kv_head * G) * E
    m, e, n = tl.arange(0, BM), tl.arange(0, BE), tl.arange(0, BN)
    t = tl.program_id(0) * EACH + m // G
    ok = (m < EACH * G) & (t < size) & (chunk * size + t < T)
    wide = ok[:, None] & (e < E)
    place_ptr += t * N
    place = tl.load(place_ptr[:, None] + n, mask=ok[:, None] & (n < N), other=-1)
    count = tl.sum((place >= 0).to(tl.int32), 1)
    total = tl.zeros([BM, BE], tl.float32)
    for i in tl.range(0, tl.max(count, 0), loop_unroll_factor=4):
        there = i < count
        row = tl.load(place_ptr + i, mask=there, other=0) * G + m % G
        x = tl.load(part_ptr + row[:, None] * E + e, mask=there[:, None] & wide, other=0.0)
        total += x.to(tl.float32)
    into = dq_ptr + (t * H + m % G)[:, None] * E + e
    before = tl.load(into, mask=wide, other=0.0).to(tl.float32)
    tl.store(into, (before + total * scale).to(dq_ptr.dtype.element_ty), mask=wide)
