"""Single keys per query (C = R = 1): what a union of single keys needs beside the common kernels.

The forward and dq walk a group's union as they walk any list. Here are: the bias in the order of
the union; sums over heads for each (query, key) pair, which are the attention on each selected key
and the gradient of its bias; and dk, dv by key blocks of OWNED keys, nothing atomic.

Legend: see triton_forward.py; U slots of a union, J key blocks, 16 queries per group.
"""

import triton
import triton.language as tl

from .triton_backward import add_rows, dkv_rows, gather_rows
from .triton_union import ones, pair_number, pair_numbers, sink_range


@triton.jit
def own_places(own, chosen):
    """Places [16, BN] of a step's chosen keys in each query's own list, and its length so far."""
    return own[:, None] + tl.cumsum(chosen, 1) - chosen, own + tl.sum(chosen, 1)


@triton.jit
def pack_kernel(
    bias_ptr,  # [B, HS, T, N] float32
    packed_ptr,  # [B, HS, groups, PAIRS] float32: the same by number of the pair, 0 for sinks
    bits_ptr,
    count_ptr,
    docs_ptr,
    T,
    S,
    N,
    U,
    PAIRS,
    q_start,
    first_group,
    HS: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    BN: tl.constexpr,
):
    group, line = tl.program_id(0), tl.program_id(1)
    flat = line.to(tl.int64) * tl.num_programs(0) + group
    row = tl.arange(0, 16)
    position = (first_group + group) * 16 + row
    t = position - q_start
    ok = (t >= 0) & (t < T)
    low, end = sink_range(docs_ptr, line // HS, position, ok, S, WINDOW, SINKS, HAS_DOCS)
    own = low - end
    before = 0
    count = tl.load(count_ptr + flat)
    for first in range(0, count, BN):
        n = first + tl.arange(0, BN)
        bits = tl.load(bits_ptr + flat * U + n, mask=n < count, other=0)
        chosen = (bits[None, :] >> row[:, None]) & 1
        place, own = own_places(own, chosen)
        number, before = pair_numbers(before, bits, row)
        at = (line.to(tl.int64) * T + t)[:, None] * N + place
        there = (chosen == 1) & ok[:, None]
        bias = tl.load(bias_ptr + at, mask=there & (place >= 0), other=0.0)
        tl.store(packed_ptr + flat * PAIRS + number, bias, mask=there)


@triton.jit
def unit_rows(ptr, b, t, head, ok, T, H: tl.constexpr, E: tl.constexpr, BE: tl.constexpr):
    """[BM, BE] rows of [B, T, H, E], 0 where not ok."""
    e = tl.arange(0, BE)
    at = ((b.to(tl.int64) * T + t) * H + head) * E
    return tl.load(ptr + at[:, None] + e[None, :], mask=ok[:, None] & (e < E)[None, :], other=0.0)


@triton.jit
def pair_sums_kernel(
    q_ptr,
    k_ptr,
    v_ptr,  # v, do, delta only where GRADIENT
    do_ptr,
    lse_ptr,
    delta_ptr,
    sum_ptr,  # [B, HS, T, N] float32, zero; of earlier units where ADD
    list_ptr,  # [B, HS, groups, U] int32
    bits_ptr,
    count_ptr,
    packed_ptr,
    docs_ptr,
    T,
    S,
    N,
    U,
    PAIRS,
    q_start,
    first_group,
    first_unit,
    factor,
    scale_log2,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    HS: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    UNITS: tl.constexpr,
    EACH: tl.constexpr,  # heads of a unit, all of one key-value head
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GRADIENT: tl.constexpr,
    ADD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """factor times the sum of p over the heads that share a selection, for each selected key of
    each query; of p (dP - delta), the gradient of the logits, where GRADIENT. A launch takes UNITS
    units of heads and holds their queries: 16 queries times EACH heads are a product's rows."""
    MOST: tl.constexpr = BM // 16  # EACH as a power of two
    group, line = tl.program_id(0), tl.program_id(1)
    b, hs = line // HS, line % HS
    flat = line.to(tl.int64) * tl.num_programs(0) + group
    query = tl.arange(0, 16)
    position = (first_group + group) * 16 + query
    t = position - q_start
    ok = (t >= 0) & (t < T)
    low, end = sink_range(docs_ptr, b, position, ok, S, WINDOW, SINKS, HAS_DOCS)
    own = low - end
    before = 0
    m = tl.arange(0, BM)
    row_t = (first_group + group) * 16 + m // MOST - q_start
    row_ok = (row_t >= 0) & (row_t < T) & (m % MOST < EACH)
    qs, lses, dos, deltas = (), (), (), ()
    for i in tl.static_range(UNITS):
        head = hs * (H // HS) + (first_unit + i) * EACH + m % MOST
        row_at = (b.to(tl.int64) * H + head) * T + row_t
        q = unit_rows(q_ptr, b, row_t, head, row_ok, T, H, E, BE)
        lse = tl.load(lse_ptr + row_at, mask=row_ok, other=float("inf")) * 1.4426950408889634
        # Triton knows no starred tuple.
        qs, lses = qs + (q,), lses + (lse,)  # type: ignore[assignment]  # noqa: RUF005
        if GRADIENT:
            do = unit_rows(do_ptr, b, row_t, head, row_ok, T, H, E, BE)
            delta = tl.load(delta_ptr + row_at, mask=row_ok, other=0.0)
            dos, deltas = dos + (do,), deltas + (delta,)  # type: ignore[assignment]  # noqa: RUF005
    e = tl.arange(0, BE)
    count = tl.load(count_ptr + flat)
    list_ptr += flat * U
    bits_ptr += flat * U
    k_ptr += b.to(tl.int64) * S * K * E
    v_ptr += b.to(tl.int64) * S * K * E
    for first in tl.range(0, count, BN, num_stages=STAGES):
        n = first + tl.arange(0, BN)
        key = tl.load(list_ptr + n, mask=n < count, other=0)
        bits = tl.load(bits_ptr + n, mask=n < count, other=0)
        chosen = (bits[None, :] >> query[:, None]) & 1
        place, own = own_places(own, chosen)
        there = (chosen == 1) & ok[:, None]
        if HAS_BIAS:
            number, before = pair_numbers(before, bits, query)
            extra = tl.load(packed_ptr + flat * PAIRS + number, mask=there, other=0.0)
            extra = tl.broadcast_to((extra * 1.4426950408889634)[:, None, :], [16, MOST, BN])
            extra = tl.reshape(extra, [BM, BN])
        total = tl.zeros([BM, BN], tl.float32)
        at_key = key.to(tl.int64) * (K * E)
        for i in tl.static_range(UNITS):
            kv_head = (hs * (H // HS) + (first_unit + i) * EACH) // (H // K)
            column = (at_key + kv_head * E)[None, :] + e[:, None]
            k = tl.load(k_ptr + column, mask=e[:, None] < E, other=0.0)
            s = tl.dot(qs[i], k, input_precision="ieee") * scale_log2
            if HAS_BIAS:
                s += extra
            p = tl.exp2(s - lses[i][:, None])
            if GRADIENT:
                v = tl.load(v_ptr + column, mask=e[:, None] < E, other=0.0)
                p *= tl.dot(dos[i], v, input_precision="ieee") - deltas[i][:, None]
            total += p
        # A key that a query did not choose may have any sum, infinite and none, too.
        result = tl.sum(tl.reshape(total, [16, MOST, BN]), 1)
        if HAS_DOCS:
            result = tl.where(key[None, :] >= low[:, None], result, 0.0)
        into = sum_ptr + ((line.to(tl.int64) * T + t)[:, None] * N + place)
        there = there & (place >= 0)
        result *= factor
        if ADD:
            result += tl.load(into, mask=there, other=0.0)
        tl.store(into, result, mask=there)


@triton.jit
def invert_kernel(
    start_ptr,  # [B, HS, groups, J, 2] int32: entries of the union before each key block
    count_ptr,  # [B, HS, groups] int32
    entry_ptr,  # [B, HS, J, groups] int32: groups that chose a key of the block, in order
    entries_ptr,  # [B, HS, J] int32: how many
    n_groups,
    S,
    q_start,
    OWNED: tl.constexpr,
    BS: tl.constexpr,
):
    block, line = tl.program_id(0), tl.program_id(1)
    n_owned = tl.num_programs(0)
    into = entry_ptr + (line.to(tl.int64) * n_owned + block) * n_groups
    count = 0
    for low in range(0, n_groups, BS):
        group = low + tl.arange(0, BS)
        end = tl.minimum(q_start // 16 * 16 + group * 16 + 16, S)  # keys the group may choose
        there = (group < n_groups) & (block * OWNED < end)
        flat = line.to(tl.int64) * n_groups + group
        at = start_ptr + (flat * n_owned + block) * 2
        first = tl.load(at, mask=there, other=0)
        inside = there & ((block + 1) * OWNED < end)
        last = tl.load(at + 2, mask=inside, other=0)
        last += tl.load(count_ptr + flat, mask=there & ~inside, other=0)
        hit = (last > first).to(tl.int32)
        place = count + tl.cumsum(hit, 0) - hit
        tl.store(into + place, group, mask=hit == 1)
        count += tl.sum(hit, 0)
    tl.store(entries_ptr + line * n_owned + block, count)


@triton.jit
def owned_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    list_ptr,
    bits_ptr,
    count_ptr,
    start_ptr,
    entry_ptr,
    entries_ptr,
    packed_ptr,
    docs_ptr,
    T,
    S,
    U,
    PAIRS,
    n_groups,
    q_start,
    scale,
    scale_log2,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    HS: tl.constexpr,
    WINDOW: tl.constexpr,
    OWNED: tl.constexpr,
    BM: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dk and dv of a block of keys: from the groups whose unions reach it, then from the local
    windows. A step takes EACH queries of a group with all G heads."""
    G: tl.constexpr = H // K
    EACH: tl.constexpr = min(16, BM // G)
    STEPS: tl.constexpr = (16 + EACH - 1) // EACH
    block = tl.program_id(0)
    n_owned = tl.num_programs(0)
    b, kv_head = tl.program_id(1) // K, tl.program_id(1) % K
    line = b * HS + (kv_head if HS > 1 else 0)
    c = tl.arange(0, OWNED)
    key = block * OWNED + c
    e = tl.arange(0, BE)
    ok = (key < S)[:, None] & (e < E)
    at = ((b.to(tl.int64) * S + key) * K + kv_head)[:, None] * E + e
    k = tl.load(k_ptr + at, mask=ok, other=0.0)
    v = tl.load(v_ptr + at, mask=ok, other=0.0)
    dk = tl.zeros([OWNED, BE], tl.float32)
    dv = tl.zeros([OWNED, BE], tl.float32)
    m = tl.arange(0, BM)
    owner = line.to(tl.int64) * n_owned + block
    entry_base = entry_ptr + owner * n_groups
    n_steps = tl.load(entries_ptr + owner) * STEPS
    for step in tl.range(0, n_steps, num_stages=STAGES):
        group = tl.load(entry_base + step // STEPS)
        query = step % STEPS * EACH + m // G
        used = (m < EACH * G) & (query < 16)
        t = tl.where(used, q_start // 16 * 16 + group * 16 + query - q_start, -1)
        row_ok = (t >= 0) & (t < T)
        head = kv_head * G + m % G
        q, do = gather_rows(q_ptr, do_ptr, b, t * H + head, T, H, E, BE)
        line_of = (b.to(tl.int64) * H + head) * T + t
        lse = tl.load(lse_ptr + line_of, mask=row_ok, other=0.0) * 1.4426950408889634
        flat = line.to(tl.int64) * n_groups + group
        start = start_ptr + (flat * n_owned + block) * 2
        n = tl.load(start) + c
        there = n < tl.load(count_ptr + flat)
        listed = tl.load(list_ptr + flat * U + n, mask=there, other=-1)
        bits = tl.load(bits_ptr + flat * U + n, mask=there, other=0)
        # From the union's order to one word per key of the block.
        word = tl.sum(tl.where(listed[None, :] == key[:, None], bits[None, :], 0), 1)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2
        if HAS_BIAS:
            each = ones(word)
            before = tl.load(start + 1) + tl.cumsum(each, 0) - each
            number = pair_number(before[:, None], word[:, None], query[None, :])
            chose = (((word[:, None] >> query[None, :]) & 1) == 1) & row_ok[None, :]
            bias = tl.load(packed_ptr + flat * PAIRS + number, mask=chose, other=0.0)
            s += bias * 1.4426950408889634
        p = tl.exp2(s - lse[None, :])
        chosen = ((word[:, None] >> query[None, :]) & 1) == 1
        if HAS_DOCS:
            begin = tl.load(docs_ptr + b.to(tl.int64) * S + q_start + t, mask=row_ok, other=0)
            chosen = chosen & (key[:, None] >= begin[None, :])
        p = tl.where(chosen, p, 0.0)
        dk, dv = add_rows(dk, dv, p, q, do, v, delta_ptr, line_of, row_ok, True)
    # Anew, see dkv_kernel.
    y = tl.program_id(1) + (tl.load(entries_ptr + owner) >> 31)
    b, kv_head = y // K, y % K
    low = tl.maximum(block * OWNED, q_start)
    high = tl.minimum((block + 1) * OWNED + WINDOW - 1, q_start + T)
    for first in tl.range(low, high, EACH, num_stages=1):
        at_row = first + m // G
        at_row = tl.where((m < EACH * G) & (at_row < high), at_row, -1)
        dk, dv = dkv_rows(
            dk, dv, k, v, key, q_ptr, do_ptr, q_ptr, do_ptr, lse_ptr, delta_ptr, docs_ptr, 0.0,
            b, kv_head, at_row, 0, q_start, T, S, scale_log2,
            H, G, E, BE, BM, WINDOW, 1, 1, True, HAS_DOCS, False, False
        )  # fmt: skip
    # Addresses anew, see dkv_kernel.
    key = block * OWNED + c + (tl.load(entries_ptr + owner) >> 31)
    ok = (key < S)[:, None] & (e < E)
    at = ((b.to(tl.int64) * S + key) * K + kv_head)[:, None] * E + e
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=ok)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=ok)
