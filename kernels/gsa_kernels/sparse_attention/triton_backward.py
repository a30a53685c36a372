"""Backward of sparse attention: one kernel for dq (and the bias), one for dk and dv.

The first walks the keys of a query tile as the forward does. The second is owned by a key block:
it walks the queries that attend it, those of nearby tiles through their window and the others
through an inverted list, so that nothing is atomic unless a long list is split over programs. Key
blocks too small for that (C < 16) get their gradients by atomic additions from the first kernel;
single keys per query may have them from triton_token.py instead.

Legend: see triton_forward.py.
"""

import triton
import triton.language as tl

from .triton_forward import (
    bias_of,
    first_local,
    listed_keys,
    load_gate,
    load_listed,
    load_range,
    mask_of,
    not_attended,
    program_again,
    range_of_rows,
    tile_rows,
    whereabouts,
)
from .triton_residual import restored


@triton.jit
def delta_kernel(
    out_ptr,  # [B, T, H, E], ungated
    residual_ptr,  # [B, T, H, E] int8, see triton_residual.py; where LOST
    dout_ptr,  # gradient of the gated output
    dlse_ptr,
    gate_ptr,  # [B, T, H, GATE]
    delta_ptr,
    inner_ptr,  # gradient of the ungated output
    dgate_ptr,  # [B, T, H, GATE]
    T,
    H,
    HAS_DLSE: tl.constexpr,
    LOST: tl.constexpr,
    GATE: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    BT: tl.constexpr,
):
    """delta[b, h, t] = sum_e out dout - dlse: what the softmax backward subtracts from dP.

    With a gate dout is that of the ungated output, written here along with the gate's gradient.
    """
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    e = tl.arange(0, BE)
    t_ok = t < T
    ok = t_ok[:, None] & (e < E)
    first = (b.to(tl.int64) * T + tl.program_id(0) * BT) * H + h
    row = tl.arange(0, BT) * H
    at = row[:, None] * E + e
    rounded = tl.load(out_ptr + first * E + at, mask=ok, other=0.0)
    out = rounded.to(tl.float32)
    dout = tl.load(dout_ptr + first * E + at, mask=ok, other=0.0).to(tl.float32)
    if GATE > 0:
        gate = load_gate(gate_ptr, first, row, t_ok, GATE, BE)
        dgate = out * dout
        if GATE == 1:
            total = tl.sum(dgate, 1).to(dgate_ptr.dtype.element_ty)
            tl.store(dgate_ptr + first + row, total, mask=t_ok)
        else:
            tl.store(dgate_ptr + first * E + at, dgate.to(dgate_ptr.dtype.element_ty), mask=ok)
        inner = (dout * gate).to(inner_ptr.dtype.element_ty)
        tl.store(inner_ptr + first * E + at, inner, mask=ok)
        dout = inner.to(tl.float32)  # delta must be that of the dout which the next kernels read
    if LOST > 0:
        residual = tl.load(residual_ptr + first * E + at, mask=ok, other=0)
        out = restored(rounded, residual, LOST)
    delta = tl.sum(out * dout, 1)
    line = (b.to(tl.int64) * H + h) * T + t
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + line, mask=t_ok, other=0.0)
    tl.store(delta_ptr + line, delta, mask=t_ok)


@triton.jit
def probabilities(s, lse, extra, scale_log2, HAS_EXTRA: tl.constexpr):
    """Of products s, with lse and the bias `extra` in units of log2."""
    # Adding a zero would cost an instruction for each.
    if HAS_EXTRA:
        return tl.exp2(s * scale_log2 + extra - lse)
    return tl.exp2(s * scale_log2 - lse)


@triton.jit
def softmax_backward(
    q, k, v, do, lse, delta, extra, mask, scale_log2, HAS_EXTRA: tl.constexpr, MASKED: tl.constexpr
):
    """(p, ds) of one step, ds without the factor `scale`. mask: 0 or -inf, where MASKED."""
    if MASKED:
        s = tl.dot(q, k, mask, input_precision="ieee")
    else:
        s = tl.dot(q, k, input_precision="ieee")
    p = probabilities(s, lse[:, None], extra, scale_log2, HAS_EXTRA)
    dp = tl.dot(do, v, input_precision="ieee")
    return p, p * (dp - delta[:, None])


@triton.jit
def add_keys(dk_base, dv_base, key, key_ok, q, do, p, ds, scale, K: tl.constexpr, E: tl.constexpr,
             BE: tl.constexpr):  # fmt: skip
    """Add atomically to dk, dv of some keys what BM rows give."""
    dk = tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision="ieee") * scale
    dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision="ieee")
    e = tl.arange(0, BE)[None, :]
    into, ok = key.to(tl.int64)[:, None] * (K * E) + e, key_ok[:, None] & (e < E)
    tl.atomic_add(dk_base + into, dk, mask=ok, sem="relaxed")
    tl.atomic_add(dv_base + into, dv, mask=ok, sem="relaxed")


@triton.jit
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    dk_ptr,  # float32 [B, S, K, E], only where ATOMIC
    dv_ptr,
    list_ptr,
    bits_ptr,
    count_ptr,
    bias_ptr,
    dbias_ptr,  # [B, K, Q, PARTS, N] float32; UNION: [B, H, T, OWN]
    docs_ptr,
    sink_ptr,
    T,
    S,
    q_start,
    first_tile,
    n_tiles,
    N,
    OWN,
    sink_stride,
    scale,
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
    ATOMIC: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
    RANGE_STAGES: tl.constexpr,
):
    G: tl.constexpr = H // K
    PARTS: tl.constexpr = (R * G + BM - 1) // BM
    i, part, b, kv_head = whereabouts(0, K, PARTS)
    tile = first_tile + i
    position, t, head, row_ok = tile_rows(part, kv_head, tile, q_start, T, H, G, R, BM)
    e = tl.arange(0, BE)
    e_ok = e < E
    row_offset = (b.to(tl.int64) * T + t) * H + head
    q_ok = row_ok[:, None] & e_ok
    q = tl.load(q_ptr + row_offset[:, None] * E + e, mask=q_ok, other=0.0)
    do = tl.load(do_ptr + row_offset[:, None] * E + e, mask=q_ok, other=0.0)
    line = (b.to(tl.int64) * H + head) * T + t
    lse = tl.load(lse_ptr + line, mask=row_ok, other=float("inf")) * 1.4426950408889634
    delta = tl.load(delta_ptr + line, mask=row_ok, other=0.0)
    start = position * 0
    if HAS_DOCS:
        start = tl.load(docs_ptr + b.to(tl.int64) * S + position, mask=row_ok, other=0)
    A: tl.constexpr = 1 if UNION else R
    local = first_local(tile * R, C, A, WINDOW)
    stop = tl.minimum(tile * R + R, q_start + T)
    base = (b.to(tl.int64) * S * K + kv_head) * E
    k_base, v_base = k_ptr + base, v_ptr + base
    offs_n = tl.arange(0, BN)
    dq = tl.zeros([BM, BE], tl.float32)

    hs = kv_head if HS > 1 else 0
    entry = (b.to(tl.int64) * HS + hs) * n_tiles + i
    list_base = list_ptr + entry * N
    n_keys = tl.load(count_ptr + entry) * C
    own = tl.zeros([BM], tl.int32)
    own_line = (b.to(tl.int64) * HS + hs) * T + t
    pairs = 0
    for low in tl.range(0, n_keys, BN, num_stages=STAGES):
        row, key, n, n_ok = listed_keys(list_base, low, n_keys, C, BN)
        offset = key.to(tl.int64) * (K * E)
        k = load_listed(k_base, k_desc, b, row, kv_head * E, offset, E, BE, BN, TMA, BE == E)
        v = load_listed(v_base, v_desc, b, row, kv_head * E, offset, E, BE, BN, TMA, BE == E)
        query = position - tile * R
        outside, bits = not_attended(
            bits_ptr + entry * N, key, n, n_ok, low, n_keys, start, query, C, BN, UNION, HAS_DOCS
        )  # fmt: skip
        mask = mask_of(tl.broadcast_to(outside, [BM, BN]))
        extra = 0.0
        if HAS_BIAS:
            extra, pairs = bias_of(
                bias_ptr, entry, own_line, own, pairs, bits, n, n_ok, low, query, row_ok, N, OWN,
                C, BN, UNION
            )  # fmt: skip
            extra = extra * 1.4426950408889634
        p, ds = softmax_backward(
            q, k, v, do, lse, delta, extra, mask, scale_log2, HAS_BIAS,
            HAS_DOCS or UNION or C % BN != 0
        )  # fmt: skip
        if UNION:
            if HAS_BIAS and C > 1:
                at_own = ((b.to(tl.int64) * H + head) * T + t) * OWN + own
                tl.store(dbias_ptr + at_own, tl.sum(ds, 1), mask=row_ok & (bits == 1))
            if C > 1:
                own += bits
        elif HAS_BIAS:
            into = dbias_ptr + (((b * K + kv_head).to(tl.int64) * n_tiles + i) * PARTS + part) * N
            if C >= BN:
                into += low // C
                total = tl.sum(ds)
                if C > BN:  # the same thread adds up the parts of a block
                    if low % C != 0:
                        total += tl.load(into)
                tl.store(into, total)
            else:
                slots: tl.constexpr = BN // C
                per_key = tl.reshape(tl.sum(ds, 0), [slots, C])
                slot = low // C + tl.arange(0, slots)
                tl.store(into + slot, tl.sum(per_key, 1), mask=slot < N)
        dq = tl.dot(ds.to(k.dtype), tl.trans(k), dq, input_precision="ieee")
        if ATOMIC:
            add_keys(dk_ptr + base, dv_ptr + base, key, n_ok, q, do, p, ds, scale, K, E, BE)

    sink_low, sinks = 0, 0
    if HAS_SINKS:
        sink = sink_ptr + b * sink_stride + i * 2
        sink_low = tl.load(sink)
        reach = first_local(tile * R + R - A, C, A, WINDOW)
        sinks = tl.maximum(tl.minimum(tl.load(sink + 1), reach) - sink_low, 0)
    far = tl.cdiv(sinks, BN)
    for step in tl.range(0, far + tl.cdiv(stop - local, BN), num_stages=RANGE_STAGES):
        is_sink = step < far
        low = tl.where(is_sink, sink_low + step * BN, local + (step - far) * BN)
        end = tl.where(is_sink, sink_low + sinks, stop)
        key = low + offs_n
        key_ok = key < end
        column = kv_head * E
        k = load_range(k_base, k_desc, b, low, column, key, key_ok, K, E, BE, BN, TMA).T
        v = load_range(v_base, v_desc, b, low, column, key, key_ok, K, E, BE, BN, TMA).T
        first, end = range_of_rows(end, is_sink, position, start, C, A, WINDOW, UNION)
        outside = end[:, None] - 1 - key[None, :]
        if HAS_DOCS or UNION:
            outside = outside | (key[None, :] - first[:, None])
        mask = mask_of(outside)
        p, ds = softmax_backward(q, k, v, do, lse, delta, 0.0, mask, scale_log2, False, True)
        dq = tl.dot(ds.to(k.dtype), tl.trans(k), dq, input_precision="ieee")
        if ATOMIC:
            add_keys(dk_ptr + base, dv_ptr + base, key, key_ok, q, do, p, ds, scale, K, E, BE)

    zero = tl.load(count_ptr) >> 31
    i, part, b, kv_head = whereabouts(zero, K, PARTS)
    tile = first_tile + i
    _, t, head, row_ok = tile_rows(part, kv_head, tile, q_start, T, H, G, R, BM, zero)
    row_offset = (b.to(tl.int64) * T + t) * H + head
    q_ok = row_ok[:, None] & e_ok
    tl.store(
        dq_ptr + row_offset[:, None] * E + e, (dq * scale).to(dq_ptr.dtype.element_ty), mask=q_ok
    )


@triton.jit
def gather_rows(q_ptr, do_ptr, b, row, T, H: tl.constexpr, E: tl.constexpr, BE: tl.constexpr):
    """[BM, BE] rows t H + head (of 32 bits) of q and dO of a sequence, zero where no such t is."""
    e = tl.arange(0, BE)
    ok = (row.to(tl.uint32, bitcast=True) < T * H)[:, None] & (e < E)
    base, at = b.to(tl.int64) * T * H * E, row.to(tl.int64)[:, None] * E + e
    q_ptr, do_ptr = q_ptr + base, do_ptr + base
    return tl.load(q_ptr + at, mask=ok, other=0.0), tl.load(do_ptr + at, mask=ok, other=0.0)


@triton.jit
def load_rows(at, ok, other, BOX: tl.constexpr):
    """A number of each row. BOX: they follow one another. Else, of 64, the compiler may take so
    little for cheap: each thread would fetch the 16 that its columns of the logits need, with
    addresses of its own. With nothing beside each they are enough for threads to share."""
    if BOX or at.shape[0] != 64:
        return tl.load(at, mask=ok, other=other)
    n = tl.arange(0, 2)[None, :]
    x, _ = tl.split(tl.load(at[:, None] + n * 0, mask=ok[:, None] & (n == 0), other=other))
    return x


@triton.jit
def add_rows(dk, dv, p, q, do, v, delta_ptr, line, row_ok, BOX: tl.constexpr):
    """dk, dv [C, BE] plus what the rows give; p [C, BM]. Rows that are nobody's have q = dO = 0
    and so give nothing, whatever is finite."""
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(do), input_precision="ieee")
    # As late as can be: a thread holds a quarter of them.
    delta = load_rows(delta_ptr + line, row_ok, 0.0, BOX)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def dkv_rows(
    dk, dv, k, v, key, q_ptr, do_ptr, q_desc, do_desc, lse_ptr, delta_ptr, docs_ptr, extra, b,
    kv_head, tile, step, q_start, T, S, scale_log2, H: tl.constexpr, G: tl.constexpr,
    E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, WINDOW: tl.constexpr, C: tl.constexpr,
    R: tl.constexpr, LOCAL: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_EXTRA: tl.constexpr,
    TMA: tl.constexpr
):  # fmt: skip
    """Add to dk, dv [C, BE] what BM query rows of a tile give, the step-th of its R G / BM parts.

    A part is BM queries of one head where BM divides R, which is one box; else rows mix heads.
    LOCAL: the queries attend the block through their window, up to the diagonal.
    """
    m = tl.arange(0, BM)
    first, head, g = 0, kv_head * G, m % G
    if R == 1:  # tile: BM numbers; a row that is nobody's has a negative one
        n = tile - q_start
    elif R % BM == 0:
        first, head = tile * R + step // G * BM - q_start, head + step % G
        n, g = m, 0
    elif BM % G == 0:
        n = tile * R + step * (BM // G) - q_start + m // G
    else:
        n, g = tile * R - q_start + (step * BM + m) // G, (step * BM + m) % G
    t = first + n
    at_row = q_start + t
    row_ok = (t >= 0) & (t < T)
    if TMA:
        q = q_desc.load([b, first, head * E]).reshape([BM, BE])
        do = do_desc.load([b, first, head * E]).reshape([BM, BE])
    else:
        q, do = gather_rows(q_ptr, do_ptr, b, t * H + (head + g), T, H, E, BE)
    # A pointer and offsets of 32 bits: registers are few.
    start = (b.to(tl.int64) * H + head) * T + first
    lse_ptr, delta_ptr, line = lse_ptr + start, delta_ptr + start, g * T + n
    lse = load_rows(lse_ptr + line, row_ok, 0.0, TMA) * 1.4426950408889634
    if LOCAL or HAS_DOCS:
        outside = tl.zeros([1, 1], tl.int32)
        if HAS_DOCS:
            start = load_rows(docs_ptr + b.to(tl.int64) * S + at_row, row_ok, 0, TMA)
            outside = key[:, None] - start[None, :]
        if LOCAL:
            outside = outside | (at_row[None, :] - key[:, None])
            if C == 1:  # else the window of a tile that reaches a block takes all of it
                reach = first_local(at_row, C, R, WINDOW)
                outside = outside | (key[:, None] - reach[None, :])
        s = tl.dot(k, tl.trans(q), mask_of(outside), input_precision="ieee")
    else:
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
    p = probabilities(s, lse[None, :], extra, scale_log2, HAS_EXTRA)
    return add_rows(dk, dv, p, q, do, v, delta_ptr, line, row_ok, TMA)


@triton.jit
def owned_segment(segment_ptr, zero, K: tl.constexpr, HS: tl.constexpr, AGAIN: tl.constexpr):
    """(pointer to its segment, sequence, key-value head, number of the lists) of a program; zero,
    AGAIN: see whereabouts."""
    if AGAIN:
        x, y, n = program_again()
    else:
        x, y, n = tl.program_id(0), tl.program_id(1) + zero, tl.num_programs(0)
    b, kv_head = y // K, y % K
    group = b * HS + (kv_head if HS > 1 else 0)
    at = group.to(tl.int64) * n + x
    return segment_ptr + at * 4, b, kv_head, group


@triton.jit
def dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    q_desc,  # Q and dO as [B, T, H E] in boxes of 1 x BM x E; used where TMA
    do_desc,
    lse_ptr,
    delta_ptr,
    dk_ptr,  # float32 [B, S, K, E], zero where MANY
    dv_ptr,
    segment_ptr,  # [B, HS, segments, 4] int32: key block, places [first, last) of the list, number
    tile_ptr,  # [B, HS, entries] int32: tiles (numbered from 0) that chose the block, in order
    slot_ptr,  # [B, HS, entries] int32: place in the bias, for each of them; -1 for a sink
    bias_ptr,
    docs_ptr,
    T,
    S,
    q_start,
    first_tile,
    n_tiles,
    n_entries,
    n_bias,
    scale,
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
    HAS_DOCS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MANY: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
    RANGE_STAGES: tl.constexpr,
):
    G: tl.constexpr = H // K
    # Steps of a tile, or (R = 1) queries of a step.
    STEPS: tl.constexpr = R * G // BM if R > 1 else 1
    EACH: tl.constexpr = 1 if R > 1 else BM // G
    segment, b, kv_head, group = owned_segment(segment_ptr, 0, K, HS, False)
    block = tl.load(segment)
    if block >= 0:
        first, last = tl.load(segment + 1), tl.load(segment + 2)
        key = block * C + tl.arange(0, C)
        e = tl.arange(0, BE)
        ok = (key < S)[:, None] & (e < E)
        base = (b.to(tl.int64) * S * K + kv_head) * E
        at = base + key.to(tl.int64)[:, None] * (K * E) + e
        k = tl.load(k_ptr + at, mask=ok, other=0.0)
        v = tl.load(v_ptr + at, mask=ok, other=0.0)
        dk = tl.zeros([C, BE], tl.float32)
        dv = tl.zeros([C, BE], tl.float32)
        list_base = group.to(tl.int64) * n_entries
        m = tl.arange(0, BM)
        for step in tl.range(0, tl.cdiv(last - first, EACH) * STEPS, num_stages=STAGES):
            if R == 1:
                place = first + step * EACH + m // G
                there = (place < last) & (m < EACH * G)
                place += list_base
                tile = load_rows(tile_ptr + place, there, 0, False)
                tile = tl.where(there, first_tile + tile, -1)
            else:
                place = list_base + first + step // STEPS
                there = place >= 0
                tile = first_tile + tl.load(tile_ptr + place)
            extra = 0.0
            if HAS_BIAS:
                bias = bias_ptr + group.to(tl.int64) * n_bias
                if R == 1:
                    slot = load_rows(slot_ptr + place, there, -1, False)
                    extra = load_rows(bias + slot, slot >= 0, 0.0, False)[None, :]
                else:
                    slot = tl.load(slot_ptr + place)
                    extra = tl.load(bias + slot, mask=slot >= 0, other=0.0)
                extra = extra * 1.4426950408889634
            dk, dv = dkv_rows(
                dk, dv, k, v, key, q_ptr, do_ptr, q_desc, do_desc, lse_ptr, delta_ptr, docs_ptr,
                extra, b, kv_head, tile, step % STEPS, q_start, T, S, scale_log2,
                H, G, E, BE, BM, WINDOW, C, R, False, HAS_DOCS, HAS_BIAS, TMA
            )  # fmt: skip
        # Anew, see whereabouts.
        zero = tl.load(segment_ptr + 3) >> 31
        segment, b, kv_head, group = owned_segment(segment_ptr, zero, K, HS, not TMA)
        block = tl.load(segment)
        key = block * C + tl.arange(0, C)
        if tl.load(segment + 3) == 0:
            # The block's first segment also takes the tiles whose local window reaches it.
            low = tl.maximum(block * C // R, first_tile)
            high = tl.minimum(((block + 1) * C + WINDOW - 2) // R + 1, first_tile + n_tiles)
            for step in tl.range(0, tl.cdiv(high - low, EACH) * STEPS, num_stages=RANGE_STAGES):
                if R == 1:
                    tile = low + step * EACH + m // G
                    tile = tl.where((tile < high) & (m < EACH * G), tile, -1)
                else:
                    tile = low + step // STEPS
                dk, dv = dkv_rows(
                    dk, dv, k, v, key, q_ptr, do_ptr, q_desc, do_desc, lse_ptr, delta_ptr,
                    docs_ptr, 0.0, b, kv_head, tile, step % STEPS, q_start, T, S,
                    scale_log2, H, G, E, BE, BM, WINDOW, C, R, True, HAS_DOCS, False, TMA
                )  # fmt: skip
        dk *= scale
        zero = tl.load(segment_ptr + 3) >> 31
        segment, b, kv_head, group = owned_segment(segment_ptr, zero, K, HS, not TMA)
        # Counted from the block's first key: offsets of 64 bits would spill.
        block = tl.load(segment)
        if TMA:
            keys = S
        else:
            keys = S + zero  # its upper half, too, would be kept
        first = ((b.to(tl.int64) * keys + block * C) * K + kv_head) * E
        c, e = tl.arange(0, C)[:, None], tl.arange(0, BE)[None, :]
        at, ok = c * (K * E) + e, (c < keys - block * C) & (e < E)
        dk_ptr, dv_ptr = dk_ptr + first, dv_ptr + first
        if MANY:
            tl.atomic_add(dk_ptr + at, dk, mask=ok, sem="relaxed")
            tl.atomic_add(dv_ptr + at, dv, mask=ok, sem="relaxed")
        else:
            tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=ok)
            tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=ok)
