"""Forward of sparse attention: one program per query tile (or part of it) and key-value head.

A program holds BM rows, row = (query of the tile, head of the group), and walks three runs of keys
with an online softmax: the sinks (a range), the selected blocks (a list) and the local window (a
range that ends at the diagonal). Only ranges need masks, so the loop over the list has none. All
tiles of one key-value head run before those of the next: its keys and values then stay in the L2.

Where each query chooses alone (UNION; R = 1) a program takes R neighbouring queries, the list is
the union of their choices, and a bit per query says who chose what. A query's list is ascending
as the union is, so counting its bits gives its place there. Unions of single keys (C = 1) are
gathered BN at a time; they hold each query's sinks too, and triton_token.py has the rest.

Legend: B batch, T queries, S keys, H query heads, K key-value heads, G = H / K, E head width,
Q tiles, N list slots, C keys per block, R queries per tile, BM rows and BN keys per step.
"""

import os

import triton
import triton.language as tl

from .triton_residual import residual_of
from .triton_union import pair_numbers, unchosen

ASSEMBLY = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")


@triton.jit
def tile_rows(
    pid, kv_head, tile, q_start, T, H, G: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, zero=0
):
    """Absolute position, index into T, query head and validity of a program's BM rows. zero: see
    whereabouts."""
    row = pid * BM + tl.arange(0, BM) + zero
    position = tile * R + row // G
    t = position - q_start
    head = kv_head * G + row % G
    return position, t, head, (row < R * G) & (t >= 0) & (t < T)


@triton.jit
def program_again():
    """program_id(0), program_id(1), num_programs(0), read once more: of equal reads the compiler
    makes one, and then keeps it in a register."""
    if ASSEMBLY:
        x = tl.inline_asm_elementwise(
            "mov.u32 $0, %ctaid.x;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
        y = tl.inline_asm_elementwise(
            "mov.u32 $0, %ctaid.y;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
        n = tl.inline_asm_elementwise(
            "mov.u32 $0, %nctaid.x;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        x, y, n = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    return x, y, n


@triton.jit
def whereabouts(zero, K: tl.constexpr, PARTS: tl.constexpr, AGAIN: tl.constexpr = False):
    """(tile from 0, part of it, sequence, key-value head) of a program. Computed anew after a
    loop, from a zero that the compiler cannot know: kept over the loop, what follows from them
    would push the accumulator out of the registers. AGAIN: so would the program's own numbers."""
    if AGAIN:
        x, y, _ = program_again()
    else:
        x, y = tl.program_id(0) + zero, tl.program_id(1) + zero
    return x // PARTS, x % PARTS, y // K, y % K


@triton.jit
def first_local(position, C: tl.constexpr, R: tl.constexpr, WINDOW: tl.constexpr):
    """First key of a query's local window: C-aligned, counted from its tile's anchor."""
    anchor = position // R * R
    return tl.maximum(anchor - WINDOW + 1, 0) // C * C


@triton.jit
def logits_of(q, k, scale_log2):
    """q [BM, E] . k [E, BN] in float32, in units of log2."""
    return tl.dot(q, k, input_precision="ieee") * scale_log2


@triton.jit
def mask_of(outside):
    """0.0 where an int32 (below 2^23) is not negative, else -inf: what a product q k starts from.
    Comparisons would be kept beside the product, packed into registers that are few."""
    return (outside & -8388608).to(tl.float32, bitcast=True)


@triton.jit
def load_range(
    x_base, desc, b, row, column, key, key_ok, K: tl.constexpr, E: tl.constexpr,
    BE: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """[BN, BE] consecutive rows of keys or values: one box, or pointers where key_ok."""
    if TMA:
        return desc.load([b, row, column]).reshape([BN, BE])
    e = tl.arange(0, BE)
    offset = key.to(tl.int64)[:, None] * (K * E) + e
    return tl.load(x_base + offset, mask=key_ok[:, None] & (e < E), other=0.0)


@triton.jit
def range_of_rows(
    end, is_sink, position, start, C: tl.constexpr, A: tl.constexpr, WINDOW: tl.constexpr,
    UNION: tl.constexpr
):  # fmt: skip
    """[first, end) of the sinks, or of the local window, that each row attends, both before `end`.
    The rows of a union have windows of their own."""
    end = tl.minimum(position + 1, end)
    if UNION:
        reach = first_local(position, C, A, WINDOW)
        end = tl.where(is_sink, tl.minimum(end, reach), end)
        start = tl.maximum(start, tl.where(is_sink, 0, reach))
    return start, end


@triton.jit
def listed_keys(list_base, low, n_keys, C: tl.constexpr, BN: tl.constexpr):
    """Step `low` of a list: (first key where they follow one another, keys, their numbers in the
    list, which of these there are)."""
    n = low + tl.arange(0, BN)
    n_ok = n < n_keys
    row = low
    if C % BN == 0:
        row = tl.load(list_base + low // C) * C + low % C
        key = row + tl.arange(0, BN)
    else:
        key = tl.load(list_base + n // C, mask=n_ok, other=0) * C + n % C
    return row, key, n, n_ok


@triton.jit
def load_listed(
    x_base, desc, b, row, column, offset, E: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
    TMA: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """[BE, BN] keys or values of a step, each `offset` from x_base. WHOLE: all may be read."""
    e = tl.arange(0, BE)
    if TMA:
        x = desc.load([b, row, column]).reshape([BN, BE]).T
    elif WHOLE:
        x = tl.load(x_base + offset[None, :] + e[:, None])
    else:
        x = tl.load(x_base + offset[None, :] + e[:, None], mask=(e < E)[:, None], other=0.0)
    return x


@triton.jit
def not_attended(
    bits_base, key, n, n_ok, low, n_keys, start, query, C: tl.constexpr, BN: tl.constexpr,
    UNION: tl.constexpr, HAS_DOCS: tl.constexpr
):  # fmt: skip
    """(int32 that broadcasts to [rows, keys], negative where a row does not attend a key of this
    step; of a union also the bits of its keys, or whether each row chose the block)."""
    outside = tl.zeros([1, 1], tl.int32)
    bits = 0
    if HAS_DOCS:
        outside = key[None, :] - start[:, None]
    if UNION and C == 1:
        bits = tl.load(bits_base + n, mask=n_ok, other=0)
        outside = outside | unchosen(bits[None, :], query[:, None])
    elif UNION:
        bits = (tl.load(bits_base + low // C) >> query) & 1
        outside = outside | (bits - 1)[:, None]
    elif C % BN != 0:
        outside = outside | (n_keys - 1 - n)[None, :]
    return outside, bits


@triton.jit
def bias_of(
    bias_ptr, entry, own_line, own, pairs, bits, n, n_ok, low, query, row_ok, N, OWN,
    C: tl.constexpr, BN: tl.constexpr, UNION: tl.constexpr
):  # fmt: skip
    """(bias of a step's logits, that broadcasts to [rows, keys]; pairs before the next step)."""
    if UNION and C == 1:
        number, pairs = pair_numbers(pairs, bits, query)
        chose = ((bits[None, :] >> query[:, None]) & 1) == 1
        bias = tl.load(bias_ptr + entry * OWN + number, mask=chose, other=0.0)
    elif UNION:
        chose = row_ok & (bits == 1)
        bias = tl.load(bias_ptr + own_line * OWN + own, mask=chose, other=0.0)[:, None]
    elif C % BN == 0:
        bias = tl.load(bias_ptr + entry * N + low // C)
    else:
        bias = tl.load(bias_ptr + entry * N + n // C, mask=n_ok, other=0.0)[None, :]
    return bias, pairs


@triton.jit
def accumulate(acc, m, norm, s, v, scale_log2, MASKED: tl.constexpr):
    """One step of the online softmax over logits s scale_log2, in units of log2. Scaled here,
    where it is one multiply-add with the maximum. MASKED: there may be rows whose keys are all
    masked so far; they keep m = -inf."""
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    safe = m_new
    if MASKED:
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2(m - safe)
    p = tl.exp2(s * scale_log2 - safe[:, None])
    norm = norm * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, m_new, norm, p, safe


@triton.jit
def causal_step(
    acc, m, norm, q, low, stop, position, start, k_base, v_base, k_desc, v_desc, b, column,
    scale_log2, K: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
    TMA: tl.constexpr, HAS_DOCS: tl.constexpr, FIRST: tl.constexpr
):  # fmt: skip
    """A step over keys low .. low + BN - 1 < stop of which a row sees those up to its own. In its
    first step every row sees a key. FIRST: acc, m, norm are still to begin."""
    key = low + tl.arange(0, BN)
    key_ok = key < stop
    k = load_range(k_base, k_desc, b, low, column, key, key_ok, K, E, BE, BN, TMA).T
    v = load_range(v_base, v_desc, b, low, column, key, key_ok, K, E, BE, BN, TMA)
    outside = position[:, None] - key[None, :]
    if HAS_DOCS:
        outside = outside | (key[None, :] - start[:, None])
    s = tl.dot(q, k, mask_of(outside), input_precision="ieee")
    if FIRST:
        m = tl.max(s, 1) * scale_log2
        p = tl.exp2(s * scale_log2 - m[:, None])
        norm = tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, input_precision="ieee")
    else:
        acc, m, norm, _, _ = accumulate(acc, m, norm, s, v, scale_log2, True)
    return acc, m, norm


@triton.jit
def load_gate(gate_ptr, first, row, row_ok, GATE: tl.constexpr, BE: tl.constexpr):
    """[rows, GATE or 1] in float32, of rows first + row of [B T H, GATE]: a multiplier per
    channel, or one per head."""
    if GATE == 1:
        gate = tl.load(gate_ptr + first + row, mask=row_ok, other=0.0)[:, None]
    else:
        e = tl.arange(0, BE)
        at = row[:, None] * GATE + e
        gate = tl.load(gate_ptr + first * GATE + at, mask=row_ok[:, None] & (e < GATE), other=0.0)
    return gate.to(tl.float32)


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,  # K and V as [B, S, K E] in boxes of 1 x BN x E; used where TMA
    v_desc,
    out_ptr,
    lse_ptr,  # [B, H, T] float32, natural log
    gate_ptr,  # [B, T, H, GATE], multiplies the output
    ungated_ptr,  # [B, T, H, E], what the backward needs of it; only where KEEP
    residual_ptr,  # [B, T, H, E] int8, of the ungated output; where LOST
    list_ptr,  # [B, HS, Q, N] int32
    bits_ptr,  # [B, HS, Q, N] int32, only where UNION
    count_ptr,  # [B, HS, Q] int32
    bias_ptr,  # [B, HS, Q, N] float32, natural log; UNION: [B, HS, T, OWN]; and C = 1:
    # [B, HS, Q, OWN] by number of the pair
    slot_lse_ptr,  # [B, K, Q, PARTS, N SUB, BM] float32: log2 of a block's sum of exponentials;
    # UNION: [B, H, T, OWN]
    docs_ptr,  # [B, S] int32: first position of each position's document
    sink_ptr,  # [B or 1, Q, 2] int32: sink range of each tile
    T,
    S,
    q_start,
    first_tile,
    n_tiles,
    N,
    OWN,
    sink_stride,
    scale_log2,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    HS: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    WINDOW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    UNION: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASS: tl.constexpr,
    GATE: tl.constexpr,  # channels of the gate: 0 (none), 1 (per head) or E
    KEEP: tl.constexpr,
    LOST: tl.constexpr,  # see triton_residual.py
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
    RANGE_STAGES: tl.constexpr,
):
    G: tl.constexpr = H // K
    PARTS: tl.constexpr = (R * G + BM - 1) // BM
    SUB: tl.constexpr = C // BN if C > BN else 1
    AGAIN: tl.constexpr = BM > 128 and (HAS_DOCS or HAS_MASS or (HAS_BIAS and GATE > 0))
    i, part, b, kv_head = whereabouts(0, K, PARTS, AGAIN)
    tile = first_tile + i
    position, t, head, row_ok = tile_rows(part, kv_head, tile, q_start, T, H, G, R, BM)
    e = tl.arange(0, BE)
    e_ok = e < E
    row_offset = (b.to(tl.int64) * T + t) * H + head
    if BE == E:
        q = tl.load(q_ptr + row_offset[:, None] * E + e, mask=row_ok[:, None], other=0.0)
    else:
        q = tl.load(q_ptr + row_offset[:, None] * E + e, mask=row_ok[:, None] & e_ok, other=0.0)
    unit = 1.4426950408889634 / scale_log2  # of the bias, which is added to the products
    start = position * 0
    if HAS_DOCS:
        start = tl.load(docs_ptr + b.to(tl.int64) * S + position, mask=row_ok, other=0)
    # R queries per program; A of them share a choice and so an anchor.
    A: tl.constexpr = 1 if UNION else R
    base = (b.to(tl.int64) * S * K + kv_head) * E
    k_base, v_base = k_ptr + base, v_ptr + base
    offs_n = tl.arange(0, BN)

    acc = tl.zeros([BM, BE], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)
    norm = tl.zeros([BM], tl.float32)
    local = first_local(tile * R, C, A, WINDOW)
    stop = tl.minimum(tile * R + R, q_start + T)
    if not UNION:
        # The diagonal: first, while there is no accumulator to keep.
        low = tl.maximum(tile * R // BN * BN, local)
        if BN % R == 0:
            acc, m, norm = causal_step(
                acc, m, norm, q, low, stop, position, start, k_base, v_base, k_desc, v_desc, b,
                kv_head * E, scale_log2, K, E, BE, BN, TMA, HAS_DOCS, True
            )  # fmt: skip
        else:
            for key_low in tl.range(low, stop, BN, num_stages=1):
                acc, m, norm = causal_step(
                    acc, m, norm, q, key_low, stop, position, start, k_base, v_base, k_desc,
                    v_desc, b, kv_head * E, scale_log2, K, E, BE, BN, TMA, HAS_DOCS, False
                )  # fmt: skip

    # The selected blocks: whole, and before the window of every row.
    hs = kv_head if HS > 1 else 0
    entry = (b.to(tl.int64) * HS + hs) * n_tiles + i
    list_base = list_ptr + entry * N
    n_keys = tl.load(count_ptr + entry) * C
    MASKED: tl.constexpr = HAS_DOCS or UNION or C % BN != 0
    slot_lse_line = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    slot_lse_base = slot_lse_ptr + slot_lse_line * (N * SUB * BM)
    own = tl.zeros([BM], tl.int32)  # place in the row's own list, where UNION
    own_line = (b.to(tl.int64) * HS + hs) * T + t
    pairs = 0
    for low in tl.range(0, n_keys, BN, num_stages=STAGES):
        row, key, n, n_ok = listed_keys(list_base, low, n_keys, C, BN)
        offset = key.to(tl.int64) * (K * E)
        WHOLE: tl.constexpr = BE == E and (C % BN == 0 or UNION)
        k = load_listed(k_base, k_desc, b, row, kv_head * E, offset, E, BE, BN, TMA, WHOLE)
        if TMA:
            v = v_desc.load([b, row, kv_head * E]).reshape([BN, BE])
        elif WHOLE:
            v = tl.load(v_base + offset[:, None] + e[None, :])
        else:
            v = tl.load(v_base + offset[:, None] + e[None, :], mask=e_ok[None, :], other=0.0)
        query = position - tile * R
        outside, bits = not_attended(
            bits_ptr + entry * N, key, n, n_ok, low, n_keys, start, query, C, BN, UNION, HAS_DOCS
        )  # fmt: skip
        if MASKED:
            mask = mask_of(tl.broadcast_to(outside, [BM, BN]))
            s = tl.dot(q, k, mask, input_precision="ieee")
        else:
            s = tl.dot(q, k, input_precision="ieee")
        if HAS_BIAS:
            bias, pairs = bias_of(
                bias_ptr, entry, own_line, own, pairs, bits, n, n_ok, low, query, row_ok, N, OWN,
                C, BN, UNION
            )  # fmt: skip
            s += bias * unit
        acc, m, norm, p, top = accumulate(acc, m, norm, s, v, scale_log2, UNION)
        if UNION and C > 1:
            if HAS_MASS:
                at = slot_lse_ptr + ((b.to(tl.int64) * H + head) * T + t) * OWN + own
                tl.store(at, tl.log2(tl.sum(p, 1)) + top, mask=row_ok & (bits == 1))
            own += bits
        elif HAS_MASS:
            # A step covers several blocks, or one of SUB parts of a block.
            slots: tl.constexpr = BN // C if C < BN else 1
            if slots == 1:
                if AGAIN and not HAS_DOCS and not HAS_BIAS:  # no second number of the step
                    at = slot_lse_base + low * (BM // BN) + tl.arange(0, BM)
                else:
                    at = slot_lse_base + low // BN * BM + tl.arange(0, BM)
                tl.store(at, tl.log2(tl.sum(p, 1)) + top)
            else:
                total = tl.sum(tl.reshape(p, [BM, slots, BN // slots]), 2)
                slot = (low // BN) * slots + tl.arange(0, slots)
                at = slot_lse_base + slot[None, :] * BM + tl.arange(0, BM)[:, None]
                tl.store(at, tl.log2(total) + top[:, None], mask=(slot < N * SUB)[None, :])

    zero = tl.load(count_ptr) >> 31
    i, part, b, kv_head = whereabouts(zero, K, PARTS, AGAIN)
    tile = first_tile + i
    position, t, head, row_ok = tile_rows(part, kv_head, tile, q_start, T, H, G, R, BM)
    base = (b.to(tl.int64) * S * K + kv_head) * E
    k_base, v_base = k_ptr + base, v_ptr + base
    # What is left: the sinks, and the window up to the diagonal, or beyond for a union.
    local = first_local(tile * R, C, A, WINDOW)
    stop = tl.minimum(tile * R + R, q_start + T)
    if not UNION:
        stop = tl.maximum(tile * R // BN * BN, local)
    sink_low, sinks = 0, 0
    if HAS_SINKS:
        sink = sink_ptr + b * sink_stride + i * 2
        sink_low = tl.load(sink)
        # A later row of a union may have a sink before its window that the first has inside.
        reach = first_local(tile * R + R - A, C, A, WINDOW)
        sinks = tl.maximum(tl.minimum(tl.load(sink + 1), reach) - sink_low, 0)
    far = tl.cdiv(sinks, BN)
    for step in tl.range(0, far + tl.cdiv(stop - local, BN), num_stages=RANGE_STAGES):
        is_sink = step < far
        low = tl.where(is_sink, sink_low + step * BN, local + (step - far) * BN)
        end = tl.where(is_sink, sink_low + sinks, stop)
        key = low + offs_n
        key_ok = key < end
        k = load_range(k_base, k_desc, b, low, kv_head * E, key, key_ok, K, E, BE, BN, TMA).T
        v = load_range(v_base, v_desc, b, low, kv_head * E, key, key_ok, K, E, BE, BN, TMA)
        if MASKED:
            if UNION:
                first, end = range_of_rows(end, is_sink, position, start, C, A, WINDOW, True)
                outside = (end[:, None] - 1 - key[None, :]) | (key[None, :] - first[:, None])
            else:  # these keys lie before every row
                outside = (end - 1 - key)[None, :] | (key[None, :] - start[:, None])
            s = tl.dot(q, k, mask_of(outside), input_precision="ieee")
        else:
            s = tl.dot(q, k, input_precision="ieee")
        acc, m, norm, _, _ = accumulate(acc, m, norm, s, v, scale_log2, UNION)

    zero = tl.load(count_ptr) >> 31
    i, part, b, kv_head = whereabouts(zero, K, PARTS, AGAIN)
    tile = first_tile + i
    position, t, head, row_ok = tile_rows(part, kv_head, tile, q_start, T, H, G, R, BM)
    safe = tl.where(norm > 0, norm, 1.0)
    # Rounded before the gate multiplies it, as if the gate were applied afterwards.
    acc = acc / safe[:, None]
    out = acc.to(out_ptr.dtype.element_ty)
    # Counted from the tile's first row: 64-bit offsets of up to three tensors would spill.
    first = (b.to(tl.int64) * T + (tile * R - q_start)) * H
    row = (position - tile * R) * H + head
    at, ok = row[:, None] * E + e, row_ok[:, None] & e_ok
    if LOST > 0:
        tl.store(residual_ptr + first * E + at, residual_of(acc, out, LOST), mask=ok)
    if KEEP:
        tl.store(ungated_ptr + first * E + at, out, mask=ok)
    if GATE > 0:
        gate = load_gate(gate_ptr, first, row, row_ok, GATE, BE)
        out = (out.to(tl.float32) * gate).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + first * E + at, out, mask=ok)
    lse = (m + tl.log2(safe)) * 0.6931471805599453
    tl.store(lse_ptr + (b.to(tl.int64) * H + head) * T + t, lse, mask=row_ok)


@triton.jit
def mass_kernel(
    slot_lse_ptr,  # as the forward left it
    lse_ptr,  # [B, H, T]
    mass_ptr,  # [B, HS, Q, N]
    count_ptr,
    T,
    q_start,
    first_tile,
    n_tiles,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
    HS: tl.constexpr,
    R: tl.constexpr,
    SUB: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Attention probability of each selected block, mean over the tile's queries and heads."""
    G: tl.constexpr = H // K
    PARTS: tl.constexpr = (R * G + BM - 1) // BM
    i, bh = tl.program_id(0), tl.program_id(1)
    b, hs = bh // HS, bh % HS
    entry = (b.to(tl.int64) * HS + hs) * n_tiles + i
    count = tl.load(count_ptr + entry)
    slot = tl.program_id(2) * BN + tl.arange(0, BN)
    total = tl.zeros([BN], tl.float32)
    for step in range(0, K // HS * PARTS):
        kv_head, part = hs * (K // HS) + step // PARTS, step % PARTS
        _, t, head, ok = tile_rows(part, kv_head, first_tile + i, q_start, T, H, G, R, BM)
        lse = tl.load(lse_ptr + (b.to(tl.int64) * H + head) * T + t, mask=ok, other=float("inf"))
        lse *= 1.4426950408889634
        line = (((b * K + kv_head).to(tl.int64) * n_tiles + i) * PARTS + part) * (N * SUB)
        for sub in tl.static_range(SUB):
            at = (line + slot * SUB + sub)[:, None] * BM + tl.arange(0, BM)
            s = tl.load(slot_lse_ptr + at, mask=(slot < count)[:, None], other=float("-inf"))
            total += tl.sum(tl.exp2(s - lse), 1)
    low = tl.maximum((first_tile + i) * R, q_start)
    high = tl.minimum((first_tile + i) * R + R, q_start + T)
    mean = total / ((high - low) * (H // HS))
    tl.store(mass_ptr + entry * N + slot, tl.where(slot < count, mean, 0.0), mask=slot < N)


@triton.jit
def own_mass_kernel(
    slot_lse_ptr,  # [B, H, T, OWN]
    lse_ptr,  # [B, H, T]
    mass_ptr,  # [B, HS, T, OWN]
    count_ptr,  # [B, HS, T]
    T,
    OWN,
    H: tl.constexpr,
    HS: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """The same where each query has its own list."""
    heads: tl.constexpr = H // HS
    b, hs = tl.program_id(1) // HS, tl.program_id(1) % HS
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    slot = tl.program_id(2) * BN + tl.arange(0, BN)
    line = (b.to(tl.int64) * HS + hs) * T + t
    count = tl.load(count_ptr + line, mask=t < T, other=0)
    keep = slot[None, :] < count[:, None]
    total = tl.zeros([BT, BN], tl.float32)
    for head in range(hs * heads, hs * heads + heads):
        row = (b.to(tl.int64) * H + head) * T + t
        lse = tl.load(lse_ptr + row, mask=t < T, other=float("inf")) * 1.4426950408889634
        s = tl.load(
            slot_lse_ptr + row[:, None] * OWN + slot[None, :], mask=keep, other=float("-inf")
        )
        total += tl.exp2(s - lse[:, None])
    at = mass_ptr + line[:, None] * OWN + slot[None, :]
    tl.store(at, tl.where(keep, total / heads, 0.0), mask=(t < T)[:, None] & (slot < OWN)[None, :])
