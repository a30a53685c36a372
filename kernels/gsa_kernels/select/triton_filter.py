"""The best single keys of long rows, of whose scores only some are ever written.

A threshold is guessed for each row from the scores of every STRIDE-th key (`threshold_kernel`): of
the sample as many lie above it as make it all but certain (5.5 standard deviations) that as many
candidates as wanted do. `filter_kernel` scores all candidates and appends those that reach the
threshold to the row's list, and `pick_kernel` chooses among those, exactly. Where the guess was
wrong, too few reached it or more than the list holds, it names the row, for triton_exact.py to
choose from all its scores. So the sample decides how long the choice takes and never what it is.

A list is filled from both ends, by two programs that walk the keys upwards and downwards, and
is ascending from one end to the other. Per key the filter only compares and sets a bit: the place
of a score in the list is how many bits lie below its own in its word of 32 keys, plus what the
words before it hold. No scan or store of a tile passes through shared memory.

Legend: B batch, H selection heads, J index heads, R queries per tile, CAP places of a list, BM
rows and BN keys per step.
"""

import triton
import triton.language as tl

from gsa_kernels.index_score.triton_scores import (
    ASSEMBLY,
    candidate_range,
    group_of,
    joined,
    product,
    ratio,
    scaled,
    unpacked,
)

from .triton_select import EMPTY, best, fill, has_nan, ordered, put, wanted_of


@triton.jit
def sample_rank(want, STRIDE: tl.constexpr):
    """How many of the sample shall reach the threshold. Of the `want` best, each in the sample
    with chance 1 / STRIDE, as many are there once in 10^7 rows or less."""
    mean = want / STRIDE
    return (mean + 5.5 * tl.sqrt(mean * (1.0 - 1.0 / STRIDE))).to(tl.int32) + 4


@triton.jit
def least_score(key):
    """The smallest float32 whose `ordered` key is at least this one; -inf of EMPTY."""
    order = (key << 12) - 2048
    bits = tl.where(order < 0, order ^ 0x7FFFFFFF, order)
    return tl.where(key <= EMPTY, float("-inf"), bits.to(tl.float32, bitcast=True))


@triton.jit
def misjudged(total, bound, want, CAP: tl.constexpr):
    return (total > CAP) | ((total < want) & (bound > float("-inf")))


@triton.jit(do_not_specialize=["first_tile", "rows", "most"])
def threshold_kernel(
    sample_ptr,  # [B, H, rows, stride] float32: scores of some key of every STRIDE
    docs_ptr,  # [B, S]
    wanted_ptr,  # [B, H, rows] int32, where HAS_WANTED
    bound_ptr,  # [B, H, rows] float32: the least score that is listed
    S,
    first_tile,
    rows,
    stride,
    most,
    H: tl.constexpr,
    R: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    STRIDE: tl.constexpr,
    CAP: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    HAS_WANTED: tl.constexpr,
    BN: tl.constexpr,
):
    row = tl.program_id(0)
    entry = tl.program_id(1).to(tl.int64) * rows + row
    b = tl.program_id(1) // H
    first, end = candidate_range(
        b, first_tile + row, docs_ptr, S, row >= 0, 1, R, WINDOW, SINKS, HAS_DOCS
    )
    want = wanted_of(wanted_ptr, entry, row >= 0, most, HAS_WANTED)
    rank = sample_rank(want, STRIDE)
    low, high = (first + (STRIDE - 1)) // STRIDE, end // STRIDE
    threshold = 0 * row + EMPTY
    if (end - first > CAP) & (rank < high - low):
        column = low // 16 * 16 + tl.arange(0, BN)
        ok = (column >= low) & (column < high)
        score = tl.load(sample_ptr + entry * stride + column, mask=ok, other=0.0)
        key = ordered(score, ok)
        top = tl.max(key, 0)
        while threshold < top:
            middle = (threshold + top + 1) >> 1
            n = tl.sum((key >= middle).to(tl.int32), 0)
            close = (n >= rank) & (n - rank <= rank // 16)
            threshold = tl.where(n >= rank, middle, threshold)
            top = tl.where(close, middle, tl.where(n >= rank, top, middle - 1))
    tl.store(bound_ptr + entry, least_score(threshold))


@triton.jit
def queries(
    q_ptr, weight_ptr, bias_ptr, q_line, ok, h, unit, JH: tl.constexpr, WIDTH: tl.constexpr,
    BI: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """Tuples of JH queries [BM, BI], weights [BM] and biases of the rows."""
    i = tl.arange(0, BI)
    qs, weights, biases = (), (), ()
    for j in tl.static_range(JH):
        q_at = (q_line + j)[:, None] * WIDTH + i[None, :]
        q = tl.load(q_ptr + q_at, mask=ok[:, None] & (i < WIDTH)[None, :], other=0.0)
        weight = tl.load(weight_ptr + q_line + j, mask=ok, other=0.0).to(tl.float32)
        # Triton knows no starred tuple.
        qs, weights = qs + (q,), weights + (weight,)  # type: ignore[assignment]  # noqa: RUF005
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr + h * JH + j).to(tl.float32) * unit
        biases = biases + (bias,)  # type: ignore[assignment]  # noqa: RUF005
    return qs, weights, biases


@triton.jit
def scores_of(
    qs, weights, biases, k, slope, JH: tl.constexpr, SIGMOID: tl.constexpr, WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr
):  # fmt: skip
    """[BM, BN] scores of keys [BN, BI], as score_kernel's."""
    GROUP: tl.constexpr = group_of(JH, 2 if WIDE else 4)
    BM: tl.constexpr = qs[0].shape[0]
    BN: tl.constexpr = k.shape[0]
    for first_head in tl.static_range(0, JH, GROUP):
        over = tl.zeros([BM, BN], tl.float32)
        under = tl.full([BM, BN], 1.0, tl.float32)
        for inner in tl.static_range(GROUP):
            x = product(qs[first_head + inner], k, tl.zeros([BM, BN], tl.float32), WIDE)
            x = scaled(x, slope, biases[first_head + inner], HAS_BIAS)
            weight = weights[first_head + inner][:, None]
            over, under = joined(x, weight, over, under, inner == 0, GROUP, SIGMOID)
        if first_head == 0:
            score = ratio(over, under, SIGMOID)
        else:
            score += ratio(over, under, SIGMOID)
    return score


@triton.jit
def bits_set(word):
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "popc.b32 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1
        )
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word += word >> 8
    return (word + (word >> 16)) & 63


@triton.jit
def lowest(n):
    """A word of which the lowest n bits are set; n below 0 counts as 0, above 32 as 32."""
    some = (1 << tl.minimum(tl.maximum(n, 0), 31)) - 1
    return tl.where(n > 31, -1, some)


@triton.jit
def list_two(list_ptr, place, two, column, even, odd):
    """Append the scores of two neighbouring columns, each where its bit of `two` is set."""
    if ASSEMBLY:  # a store of Triton's would gather the scores in shared memory first
        tl.inline_asm_elementwise(
            """
            {
            .reg .pred here;
            .reg .b32 one, next;
            .reg .b64 address;
            and.b32 one, $3, 1;
            mad.wide.s32 address, $2, 8, $1;
            setp.ne.u32 here, one, 0;
            @here st.global.v2.b32 [address], {$4, $5};
            mad.wide.s32 address, one, 8, address;
            and.b32 one, $3, 2;
            setp.ne.u32 here, one, 0;
            add.s32 next, $4, 1;
            @here st.global.v2.b32 [address], {next, $6};
            mov.b32 $0, 0;
            }
            """,
            "=r,l,r,r,r,r,r",
            [
                list_ptr.to(tl.int64), place, two, column,
                even.to(tl.int32, bitcast=True), odd.to(tl.int32, bitcast=True),
            ],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )  # fmt: skip
    else:
        tl.store(list_ptr + place, listed(even, column), mask=(two & 1) > 0)
        tl.store(list_ptr + place + (two & 1), listed(odd, column + 1), mask=(two & 2) > 0)


@triton.jit
def listed(score, column):
    return (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | column.to(tl.int64)


@triton.jit(do_not_specialize=["T", "q_start", "first_tile", "rows", "key_rows"])
def filter_kernel(
    q_ptr,  # [B, T, J, I]
    k_ptr,  # [B, key_rows, I]
    weight_ptr,  # [B, T, J]
    bias_ptr,  # [J]
    docs_ptr,  # [B, S]
    bound_ptr,  # [B, H, rows] float32
    list_ptr,  # [B, H, rows, CAP] int64: a score's bits, and in the lower half its key
    count_ptr,  # [B, H, rows, 2] int32: how many have reached the bound, from either end
    T,
    S,
    q_start,
    first_tile,
    rows,
    key_rows,
    scale,
    J: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    BI: tl.constexpr,
    R: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    SIGMOID: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    CAP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    JH: tl.constexpr = J // H
    WORDS: tl.constexpr = BN // 32
    b, h = tl.program_id(2) // H, tl.program_id(2) % H
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    row_ok = row < rows
    tile = first_tile + row
    first, end = candidate_range(b, tile, docs_ptr, S, row_ok, 1, R, WINDOW, SINKS, HAS_DOCS)
    end = tl.where(row_ok, end, 0)
    first = tl.where(row_ok, first, 1 << 30)
    entry = tl.program_id(2).to(tl.int64) * rows + row
    bound = tl.load(bound_ptr + entry, mask=row_ok, other=float("inf"))
    unit = -1.4426950408889634 if SIGMOID else 1.0
    q_line = (b.to(tl.int64) * T + (tile * R - q_start)) * J + h * JH
    qs, weights, biases = queries(
        q_ptr, weight_ptr, bias_ptr, q_line, row_ok, h, unit, JH, WIDTH, BI, HAS_BIAS
    )
    low = tl.min(first, 0) // BN * BN
    steps = tl.maximum(tl.max(end, 0) - low + (BN - 1), 0) // BN
    back = tl.program_id(1)  # 1: downwards, from the list's end
    begin = tl.where(back > 0, steps - 1, 0)
    n = tl.arange(0, BN)
    i = tl.arange(0, BI)
    k_at = n[:, None] * WIDTH + i[None, :]
    low_bits = 2 * tl.arange(0, 16)
    first_bit = 1 << low_bits
    place = tl.zeros([BM], tl.int32) + back * CAP
    total = tl.zeros([BM], tl.int32)
    lists = list_ptr + entry * CAP
    for step in tl.range(0, (steps + 1 - back) // 2, num_stages=STAGES):
        column_0 = low + (begin + step * (1 - 2 * back)) * BN
        k_mask = (column_0 + n < key_rows)[:, None] & (i < WIDTH)[None, :]
        k_line = (b.to(tl.int64) * key_rows + column_0) * WIDTH
        k = unpacked(tl.load(k_ptr + k_line + k_at, mask=k_mask, other=0.0), q_ptr)
        score = scores_of(qs, weights, biases, k, slope=scale * unit, JH=JH, SIGMOID=SIGMOID,
                          WIDE=WIDE, HAS_BIAS=HAS_BIAS)  # fmt: skip
        even, odd = tl.split(tl.reshape(score, [BM, WORDS, 16, 2]))
        # Not below: NaN is listed, and found there.
        two = tl.where(even < bound[:, None, None], 0, first_bit[None, None, :])
        two |= tl.where(odd < bound[:, None, None], 0, 2 * first_bit[None, None, :])
        word = tl.xor_sum(two, 2)
        from_0 = column_0 + 32 * tl.arange(0, WORDS)[None, :]
        word &= lowest(end[:, None] - from_0) & ~lowest(first[:, None] - from_0)
        held = bits_set(word)
        if WORDS == 2:  # a scan would pass through shared memory
            held_0, held_1 = tl.split(held)
            here = held_0 + held_1
            before = tl.join(held_0 * 0, held_0)
        else:
            here = tl.sum(held, 1)
            before = held * 0
        total += here
        place -= back * here
        fits = (place >= 0) & (place + here <= CAP)
        at = place[:, None] + before
        place += (1 - back) * here
        word = tl.where(fits[:, None], word, 0)[:, :, None]
        at = at[:, :, None] + bits_set(word & (first_bit - 1)[None, None, :])
        column = from_0[:, :, None] + low_bits[None, None, :]
        list_two(lists[:, None, None], at, word >> low_bits[None, None, :], column, even, odd)
    tl.store(count_ptr + entry * 2 + back, total, mask=row_ok)


@triton.jit(do_not_specialize=["rows", "most", "width"])
def pick_kernel(
    list_ptr,  # [B, H, rows, CAP] int64
    count_ptr,  # [B, H, rows, 2] int32
    bound_ptr,  # [B, H, rows] float32
    wanted_ptr,  # [B, H, rows] int32, where HAS_WANTED
    out_ptr,  # [B, H, rows, width] int32
    named_ptr,  # [B, H, rows] int32: rows whose guess was wrong, in no order
    n_named_ptr,  # [B, H] int32, of 0: how many
    total_ptr,  # [B, H, rows, TOTALS] int32, set to 0 for every row that is named
    fine_ptr,  # [1] int32, set to 0 where a candidate is NaN
    rows,
    most,
    width,
    CAP: tl.constexpr,
    TOTALS: tl.constexpr,
    HAS_WANTED: tl.constexpr,
    BW: tl.constexpr,
):
    row = tl.program_id(0) + tl.arange(0, 1)
    row_ok = row < rows
    entry = tl.program_id(1).to(tl.int64) * rows + row
    front = tl.load(count_ptr + entry * 2)
    rear = tl.load(count_ptr + entry * 2 + 1)
    want = wanted_of(wanted_ptr, entry, row_ok, most, HAS_WANTED)
    bad = misjudged(front + rear, tl.load(bound_ptr + entry), want, CAP)
    if tl.max(bad.to(tl.int32), 0) == 0:
        slot = tl.arange(0, CAP)[None, :]
        ok = (slot < front[:, None]) | (slot >= CAP - rear[:, None])
        item = tl.load(list_ptr + entry[:, None] * CAP + slot, mask=ok, other=0)
        score = (item >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        score = tl.where(ok, score, float("-inf"))
        tl.store(fine_ptr, 0, mask=has_nan(score))
        place, chosen = best(ordered(score, True), want)
        out = out_ptr + entry[:, None] * width
        put(out, place, item.to(tl.int32))
        fill(out, chosen, row_ok, width, BW)
    else:
        rank = tl.atomic_add(n_named_ptr + tl.program_id(1), 1, sem="relaxed")
        slot_named = tl.program_id(1).to(tl.int64) * rows + rank
        tl.store(named_ptr + slot_named, tl.program_id(0))
        n = tl.arange(0, 128)
        tl.store(total_ptr + slot_named * TOTALS + n, n * 0, mask=n < TOTALS)
