"""Far choices of single queries: a program takes a key block and the queries that chose it.

A program keeps a block's keys and values and gathers its queries, and writes for each (query,
head) a softmax over the block alone, divided by its own sum, and the log of that sum. A second
kernel weighs these parts of a row, and what the union tiles gave of its near choices, sinks and
window, by their sums. The order of additions is that of a query's own list.

Legend: see triton_split.py; S keys, H query heads, K key-value heads, G = H / K, E head width. A
line is a sequence and key-value head; a launch takes some lines of one chunk.
"""

import triton
import triton.language as tl

from .triton_forward import load_gate
from .triton_residual import residual_of, restored

# Compiled once for all their values.
_NUMBERS = ("T", "S", "q_start", "Q", "most", "chunk", "size", "first_line")


@triton.jit(do_not_specialize=_NUMBERS)
def gather_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    docs_ptr,  # [B, S] int32
    place_ptr,  # [B, HS, T N] int32
    item_ptr,  # [B, HS, Q, most, 3] int32
    used_ptr,  # [B, HS, Q] int32
    part_ptr,  # [lines, size, N, G, E]
    sum_ptr,  # [lines, size, N, G] float32: log2 of a sum of exponentials
    T,
    S,
    q_start,
    Q,
    most,
    chunk,
    size,
    first_line,
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
    G: tl.constexpr = H // K
    EACH: tl.constexpr = BM // G  # queries of a step
    b, kv_head = (first_line + tl.program_id(1)) // K, (first_line + tl.program_id(1)) % K
    group = b.to(tl.int64) * HS + (kv_head if HS > 1 else 0)
    line = group * Q + chunk
    item, used = tl.program_id(0), tl.program_id(0) < tl.load(used_ptr + line)
    item_ptr += (line * most + item) * 3
    block = tl.load(item_ptr, mask=used, other=0)
    first = tl.load(item_ptr + 1, mask=used, other=0)
    last = tl.load(item_ptr + 2, mask=used, other=0)
    place_ptr += (group * T + chunk * size) * N
    part_ptr += tl.program_id(1).to(tl.int64) * size * (N * G * E)
    sum_ptr += tl.program_id(1).to(tl.int64) * size * (N * G)
    q_ptr += ((b.to(tl.int64) * T + chunk * size) * H + kv_head * G) * E
    m, e = tl.arange(0, BM), tl.arange(0, BE)
    g = m % G
    key = block * C + tl.arange(0, C)
    rows = (b.to(tl.int64) * S * K + kv_head) * E + key.to(tl.int64)[:, None] * (K * E) + e
    key_ok = (key < tl.where(used, S, 0))[:, None] & (e < E)
    k = tl.load(k_ptr + rows, mask=key_ok, other=0.0)
    v = tl.load(v_ptr + rows, mask=key_ok, other=0.0)
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


@triton.jit(do_not_specialize=_NUMBERS)
def combine_kernel(
    part_ptr,  # as gather_kernel left them
    sum_ptr,
    near_ptr,  # [B, T, H, E]: of the union tiles; KEEP: replaced by the ungated output
    gate_ptr,  # [B, T, H, GATE], multiplies the output
    out_ptr,  # [B, T, H, E]; may be near_ptr
    residual_ptr,  # [B, T, H, E] int8: of near, replaced by the ungated output's; where LOST
    lse_ptr,  # [B, H, T] float32, natural log: of the union tiles, replaced by the result
    slot_lse_ptr,  # [B, H, T, N] float32: takes the sums after the near ones; where HAS_MASS
    nears_ptr,  # [B, HS, T] int32: near choices
    count_ptr,  # [B, HS, T] int32: far choices
    T,
    chunk,
    size,
    first_line,
    H: tl.constexpr,
    K: tl.constexpr,
    HS: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_MASS: tl.constexpr,
    GATE: tl.constexpr,
    KEEP: tl.constexpr,
    LOST: tl.constexpr,
):
    G: tl.constexpr = H // K
    EACH: tl.constexpr = BM // G
    b, kv_head = (first_line + tl.program_id(1)) // K, (first_line + tl.program_id(1)) % K
    hs = kv_head if HS > 1 else 0
    part_ptr += tl.program_id(1).to(tl.int64) * size * (N * G * E)
    sum_ptr += tl.program_id(1).to(tl.int64) * size * (N * G)
    m, e = tl.arange(0, BM), tl.arange(0, BE)
    t = tl.program_id(0) * EACH + m // G
    ok = (m < EACH * G) & (t < size) & (chunk * size + t < T)
    wide = ok[:, None] & (e < E)
    head = kv_head * G + m % G
    line = (b.to(tl.int64) * HS + hs) * T + chunk * size
    count = tl.load(count_ptr + line + t, mask=ok, other=0)
    at = t * (N * G) + m % G
    lse_ptr += b.to(tl.int64) * H * T + chunk * size
    lse_at = head.to(tl.int64) * T + t
    own = tl.load(lse_ptr + lse_at, mask=ok, other=0.0) * 1.4426950408889634
    top = own
    most = tl.max(count, 0)
    nears = count
    if HAS_MASS:
        nears = tl.load(nears_ptr + line + t, mask=ok, other=0)
    for low in range(0, most, BN):
        n = low + tl.arange(0, BN)[None, :]
        there = n < count[:, None]
        sums = tl.load(sum_ptr + at[:, None] + n * G, mask=there, other=float("-inf"))
        top = tl.maximum(top, tl.max(sums, 1))
        if HAS_MASS:
            into = (b.to(tl.int64) * H * T + chunk * size + lse_at) * N + nears
            tl.store(slot_lse_ptr + into[:, None] + n, sums, mask=there)
    first = (b.to(tl.int64) * T + chunk * size) * H
    row = t * H + head
    near_ptr += first * E
    residual_ptr += first * E
    wide_at = row[:, None] * E + e
    near = tl.load(near_ptr + wide_at, mask=wide, other=0.0)
    if LOST > 0:
        near = restored(near, tl.load(residual_ptr + wide_at, mask=wide, other=0), LOST)
    total = tl.exp2(own - top)
    acc = near.to(tl.float32) * total[:, None]
    for i in tl.range(0, most, loop_unroll_factor=4):
        there = i < count
        weight = tl.exp2(tl.load(sum_ptr + at + i * G, mask=there, other=float("-inf")) - top)
        x = tl.load(
            part_ptr + (at + i * G)[:, None] * E + e, mask=there[:, None] & wide, other=0.0
        )
        total += weight
        acc += x.to(tl.float32) * weight[:, None]
    acc = acc / total[:, None]
    out = acc.to(out_ptr.dtype.element_ty)
    if LOST > 0:
        tl.store(residual_ptr + wide_at, residual_of(acc, out, LOST), mask=wide)
    if KEEP:
        tl.store(near_ptr + wide_at, out, mask=wide)
    if GATE > 0:
        # Rounded before the gate multiplies it, as the union tiles do.
        gate = load_gate(gate_ptr, first, row, ok, GATE, BE)
        out = (out.to(tl.float32) * gate).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + first * E + wide_at, out, mask=wide)
    tl.store(lse_ptr + lse_at, (top + tl.log2(total)) * 0.6931471805599453, mask=ok)
