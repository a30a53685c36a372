"""Far choices of single queries: a program takes a key block and the queries that chose it.

A program keeps the keys and values of a block, or of two that follow each other, and gathers the
queries that chose it, or both. For each (query, head) it writes what part of a softmax these keys
are: the weighted sum of their values, the sum of the weights, and the exponent to which both are
relative. A second kernel brings the parts of a row, and what the union tiles gave of its near
choices, sinks and window, to one exponent and adds them up, in the order of the query's own list.

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
    item_ptr,  # [B, HS, Q, D, most, 3] int32
    used_ptr,  # [B, HS, Q, D] int32
    pairs_ptr,  # [B, HS, T] int32: pairs of a query; where HAS_MASS
    part_ptr,  # [lines, size, N, G, E]
    sum_ptr,  # [lines, size, N, G, 2] float32: exponent, to base 2, and sum of weights
    log_ptr,  # [lines, size, N, G] float32: log2 of the sum of each choice; where HAS_MASS
    ticket_ptr,  # int32, zero
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
    D: tl.constexpr,
    PAIR: tl.constexpr,  # whether the items are pairs
    HAS_DOCS: tl.constexpr,
    HAS_MASS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Programs stay and draw items: only the GPU knows how many there are."""
    G: tl.constexpr = H // K
    EACH: tl.constexpr = BM // G  # queries of a step
    KEYS: tl.constexpr = 2 * C if PAIR else C
    HALF: tl.constexpr = part_ptr.dtype.element_ty == tl.float16
    b, kv_head = (first_line + tl.program_id(1)) // K, (first_line + tl.program_id(1)) % K
    b = b.to(tl.int64)
    group = b * HS + (kv_head if HS > 1 else 0)
    kind = (group * Q + chunk) * D + (1 if PAIR else 0)
    used = tl.load(used_ptr + kind)
    held = tl.program_id(1).to(tl.int64) * size * (N * G)
    ticket_ptr += tl.program_id(1)
    item_ptr += kind * most * 3
    place_ptr += (group * T + chunk * size) * N
    pairs_ptr += group * T + chunk * size
    docs_ptr += b * S + q_start + chunk * size
    part_ptr += held * E
    sum_ptr += held * 2
    log_ptr += held
    q_ptr += ((b * T + chunk * size) * H + kv_head * G) * E
    k_ptr += (b * S * K + kv_head) * E
    v_ptr += (b * S * K + kv_head) * E
    m, e, c = tl.arange(0, BM), tl.arange(0, BE), tl.arange(0, KEYS)
    g = m % G
    wide = (e < E)[None, :]
    item = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
    while item < used:
        block = tl.load(item_ptr + item * 3)
        first = tl.load(item_ptr + item * 3 + 1)
        last = tl.load(item_ptr + item * 3 + 2) - 1
        at = first + m // G
        slot = tl.load(place_ptr + tl.minimum(at, last))
        key = block * C + c  # a chosen block lies before a window, so is whole
        rows = key.to(tl.int64)[:, None] * (K * E) + e
        if BE == E:
            k, v = tl.load(k_ptr + rows), tl.load(v_ptr + rows)
        else:
            k = tl.load(k_ptr + rows, mask=wide, other=0.0)
            v = tl.load(v_ptr + rows, mask=wide, other=0.0)
        for step in tl.range(0, tl.cdiv(last + 1 - first, EACH), num_stages=STAGES):
            # Rows past the end take the last query again, and are not written.
            there = at + step * EACH <= last
            if BM % G != 0:
                there = there & (m < EACH * G)
            t = slot // N
            if BE == E:
                q = tl.load(q_ptr + (t * H + g)[:, None] * E + e)
            else:
                q = tl.load(q_ptr + (t * H + g)[:, None] * E + e, mask=wide, other=0.0)
            # A step ahead, so that queries are fetched while the step before computes.
            slot_next = tl.load(place_ptr + tl.minimum(at + (step + 1) * EACH, last))
            s = tl.dot(q, k.T, input_precision="ieee")
            if HAS_DOCS:
                start = tl.load(docs_ptr + t)
                s = tl.where(key[None, :] >= start[:, None], s, float("-inf"))
            top = tl.max(s, 1) * scale_log2
            if HAS_DOCS:  # a choice may lie in another document
                top = tl.where(top == float("-inf"), 0.0, top)
            if HALF:  # a sum of up to 256 weighted values must not overflow
                top += 8
            p = tl.exp2(s * scale_log2 - top[:, None])
            total = tl.sum(p, 1)
            if HAS_MASS:
                if PAIR:  # the choices of part n are 2 n and 2 n + 1
                    own = tl.sum(tl.where((c < C)[None, :], p, 0.0), 1)
                    into = (slot + slot - t * N) * G + g
                    tl.store(log_ptr + into, top + tl.log2(own), mask=there)
                    tl.store(log_ptr + into + G, top + tl.log2(total - own), mask=there)
                else:
                    into = slot
                    if D > 1:
                        into += tl.load(pairs_ptr + t)
                    tl.store(log_ptr + into * G + g, top + tl.log2(total), mask=there)
            if HAS_DOCS:
                top = tl.where(total > 0, top, float("-inf"))
            out = tl.dot(p.to(v.dtype), v, input_precision="ieee")
            row = slot * G + g
            into = part_ptr + row[:, None] * E + e
            ok = there[:, None]
            if BE != E:
                ok = ok & wide
            tl.store(into, out.to(part_ptr.dtype.element_ty), mask=ok)
            into = sum_ptr + row[:, None] * 2 + tl.arange(0, 2)
            tl.store(into, tl.join(top, total), mask=there[:, None])
            slot = slot_next
        item = tl.atomic_add(ticket_ptr, 1, sem="relaxed")


@triton.jit(do_not_specialize=_NUMBERS)
def combine_kernel(
    part_ptr,  # as gather_kernel left them
    sum_ptr,
    log_ptr,
    near_ptr,  # [B, T, H, E]: of the union tiles; KEEP: replaced by the ungated output
    gate_ptr,  # [B, T, H, GATE], multiplies the output
    out_ptr,  # [B, T, H, E]; may be near_ptr
    residual_ptr,  # [B, T, H, E] int8: of near, replaced by the ungated output's; where LOST
    lse_ptr,  # [B, H, T] float32, natural log: of the union tiles, replaced by the result
    slot_lse_ptr,  # [B, H, T, N] float32: takes the sums after the near ones; where HAS_MASS
    nears_ptr,  # [B, HS, T] int32: near choices
    count_ptr,  # [B, HS, T] int32: far choices
    pairs_ptr,  # [B, HS, T] int32
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
    held = tl.program_id(1).to(tl.int64) * size * (N * G)
    part_ptr += held * E
    sum_ptr += held * 2
    log_ptr += held
    m, e = tl.arange(0, BM), tl.arange(0, BE)
    t = tl.program_id(0) * EACH + m // G
    ok = (m < EACH * G) & (t < size) & (chunk * size + t < T)
    wide = ok[:, None] & (e < E)
    head = kv_head * G + m % G
    line = (b.to(tl.int64) * HS + hs) * T + chunk * size
    chosen = tl.load(count_ptr + line + t, mask=ok, other=0)
    count = chosen - tl.load(pairs_ptr + line + t, mask=ok, other=0)
    at = t * (N * G) + m % G
    lse_ptr += b.to(tl.int64) * H * T + chunk * size
    lse_at = head.to(tl.int64) * T + t
    own = tl.load(lse_ptr + lse_at, mask=ok, other=0.0) * 1.4426950408889634
    top = own
    most = tl.max(count, 0)
    if HAS_MASS:
        nears = tl.load(nears_ptr + line + t, mask=ok, other=0)
        into = (b.to(tl.int64) * H * T + chunk * size + lse_at) * N + nears
        for low in range(0, tl.max(chosen, 0), BN):
            n = low + tl.arange(0, BN)[None, :]
            there = n < chosen[:, None]
            sums = tl.load(log_ptr + at[:, None] + n * G, mask=there, other=0.0)
            tl.store(slot_lse_ptr + into[:, None] + n, sums, mask=there)
    for low in range(0, most, BN):
        n = low + tl.arange(0, BN)[None, :]
        there = n < count[:, None]
        tops = tl.load(sum_ptr + (at[:, None] + n * G) * 2, mask=there, other=float("-inf"))
        top = tl.maximum(top, tl.max(tops, 1))
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
        own = tl.load(sum_ptr + (at + i * G) * 2, mask=there, other=float("-inf"))
        each = tl.load(sum_ptr + (at + i * G) * 2 + 1, mask=there, other=0.0)
        weight = tl.exp2(own - top)
        x = tl.load(
            part_ptr + (at + i * G)[:, None] * E + e, mask=there[:, None] & wide, other=0.0
        )
        total += each * weight
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
