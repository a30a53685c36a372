"""Exact top-k of rows of scores without sorting: count, bisect, compact.

Scores are compared as topk.comparable does. Rounded to 12 bits a float32 is an ordered integer of
20, so the threshold is found by bisection, with one count of the row per step.

`select_kernel` holds whole rows in registers. A longer row is shortened first: `shrink_kernel`,
one program a row, walks it in steps of BN columns and keeps the largest key of each of the BN
residue classes. At least w keys are no smaller than the w-th largest of those, so the w best of
the row are among them: a few more than w unless many are equal. They go, in order, to a list of BN
places. Where they do not fit the threshold is bisected over the whole row and the list is the
exact choice.

Legend: B batch, H selection heads, C keys per block, R queries per tile, BN columns per step.
"""

import triton
import triton.language as tl

from gsa_kernels.index_score.triton_scores import ASSEMBLY, candidate_range

EMPTY = tl.constexpr(-0x7F800)  # the key of -inf
NUMBER = tl.constexpr(0x4B400000)  # the bits of 2^23 + 2^22
GUESSES = tl.constexpr(6)  # steps towards a threshold before the interval is halved


@triton.jit
def ordered(score, ok):
    """int32 keys that compare as `comparable` scores do; EMPTY for -inf and where not ok."""
    bits = score.to(tl.int32, bitcast=True)
    key = (bits + 2048) >> 12
    sign = key >> 31
    return tl.where(ok, (key ^ (sign & 0x7FFFF)) - sign, EMPTY)


@triton.jit
def has_nan(score):
    bits = score.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(tl.max(bits, 1), 0) > 0x7F800000


@triton.jit
def wanted_of(wanted_ptr, entry, ok, most, HAS_WANTED: tl.constexpr):
    if HAS_WANTED:
        return tl.minimum(tl.load(wanted_ptr + entry, mask=ok, other=0), most)
    return (entry * 0).to(tl.int32) + most


@triton.jit
def next_top(n, want, middle, top):
    """The end of the bisection's interval once n keys are no smaller than its middle."""
    return tl.where(n > want, top, tl.where(n == want, middle, middle - 1))


@triton.jit
def chunk(row_ptr, low, first, end, BN: tl.constexpr, PADDED: tl.constexpr):
    """Scores of columns low .. low + BN - 1 of one row, and which of them lie in first .. end."""
    column = low + tl.arange(0, BN)
    ok = (column >= first) & (column < end)
    if PADDED:  # whole vectors: what lies between the ends and multiples of 16 is not used
        score = tl.load(row_ptr + column, mask=column < (end + 15) // 16 * 16, other=0.0)
    else:
        score = tl.load(row_ptr + column, mask=ok, other=0.0)
    return column, score, ok


@triton.jit(do_not_specialize=["first_tile", "rows", "n_columns", "most"])
def shrink_kernel(
    score_ptr,  # [B, H, rows, stride] float32
    wanted_ptr,  # [B, H, rows] int32
    docs_ptr,  # [B, S]
    short_ptr,  # [B, H, rows, BN] float32: scores that may be among the best
    column_ptr,  # [B, H, rows, BN] int32: their columns, ascending
    count_ptr,  # [B, H, rows] int32: how many
    fine_ptr,  # [1] int32, set to 0 where a candidate is NaN
    S,
    first_tile,
    rows,
    n_columns,
    stride,
    most,
    H: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    RATIO: tl.constexpr,  # key blocks per column
    RANGE: tl.constexpr,  # candidates follow from the position, in rows padded to 16
    HAS_DOCS: tl.constexpr,
    HAS_WANTED: tl.constexpr,
    BN: tl.constexpr,
):
    row = tl.program_id(0)
    entry = tl.program_id(1).to(tl.int64) * rows + row
    first, end = 0 * row, 0 * row + n_columns
    if RANGE:
        b = tl.program_id(1) // H
        first, end = candidate_range(
            b, first_tile + row, docs_ptr, S, row >= 0, C, R, WINDOW, SINKS, HAS_DOCS, RATIO
        )
    begin = first // 16 * 16
    row_ptr = score_ptr + entry * stride
    best = tl.full([BN], EMPTY, tl.int32)
    tally = tl.zeros([BN], tl.int32)  # candidates, and in the upper 16 bits NaN
    for low in range(begin, end, BN):
        column, score, ok = chunk(row_ptr, low, first, end, BN, RANGE)
        key = ordered(score, ok)
        best = tl.maximum(best, key)
        tally += (key > EMPTY).to(tl.int32) + ((score != score) & ok).to(tl.int32) * 65536
    tl.store(fine_ptr, 0, mask=tl.max(tally, 0) > 65535)
    want = wanted_of(wanted_ptr, entry, row >= 0, most, HAS_WANTED)
    want = tl.minimum(want, tl.sum(tally & 65535, 0))
    end = tl.where(want > 0, end, begin)
    high = tl.max(best, 0)
    threshold = 0 * row + (EMPTY + 1)
    top = high
    while threshold < top:
        middle = (threshold + top + 1) >> 1
        enough = tl.sum((best >= middle).to(tl.int32), 0) >= want
        threshold = tl.where(enough, middle, threshold)
        top = tl.where(enough, top, middle - 1)
    out = entry * BN
    total = 0 * row
    for low in range(begin, end, BN):
        column, score, ok = chunk(row_ptr, low, first, end, BN, RANGE)
        keep = ordered(score, ok) >= threshold
        place = total + tl.cumsum(keep.to(tl.int32), 0) - 1
        keep_here = keep & (place < BN)
        tl.store(short_ptr + out + place, score, mask=keep_here)
        tl.store(column_ptr + out + place, column, mask=keep_here)
        total += tl.sum(keep.to(tl.int32), 0)
    if total > BN:
        top = high
        while threshold < top:
            middle = (threshold + top + 1) >> 1
            counts = tl.zeros([BN], tl.int32)
            for low in range(begin, end, BN):
                column, score, ok = chunk(row_ptr, low, first, end, BN, RANGE)
                counts += (ordered(score, ok) >= middle).to(tl.int32)
            n = tl.sum(counts, 0)
            threshold = tl.where(n >= want, middle, threshold)
            top = next_top(n, want, middle, top)
        counts = tl.zeros([BN], tl.int32)
        for low in range(begin, end, BN):
            column, score, ok = chunk(row_ptr, low, first, end, BN, RANGE)
            counts += (ordered(score, ok) > threshold).to(tl.int32)
        room = want - tl.sum(counts, 0)
        tl.debug_barrier()  # the list is written again
        n_above, n_ties = 0 * row, 0 * row
        for low in range(begin, end, BN):
            column, score, ok = chunk(row_ptr, low, first, end, BN, RANGE)
            key = ordered(score, ok)
            above, tie = (key > threshold).to(tl.int32), (key == threshold).to(tl.int32)
            a = n_above + tl.cumsum(above, 0)
            t = n_ties + tl.cumsum(tie, 0)
            keep = (above > 0) | ((tie > 0) & (t <= room))
            place = a + tl.minimum(t, room) - 1
            tl.store(short_ptr + out + place, score, mask=keep)
            tl.store(column_ptr + out + place, column, mask=keep)
            n_above += tl.sum(above, 0)
            n_ties += tl.sum(tie, 0)
        total = want
    tl.store(count_ptr + entry, total)


@triton.jit
def number(key):
    """Keys as float32 numbers 1 apart: 2^23 + 2^22 + key."""
    return (key + NUMBER).to(tl.float32, bitcast=True)


@triton.jit
def reached(numbers, least):
    """[BM] int32: how many keys of each row are no smaller than `least`."""
    # Floating-point units count twice as fast as those that compare.
    return tl.sum(reaches(numbers, least), 1).to(tl.int32)


@triton.jit
def reaches(numbers, least):
    """1.0 where a key is no smaller than its row's `least`, else 0.0."""
    over = numbers - number(least - 1)[:, None]
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "cvt.sat.f32.f32 $0, $1;", "=f,f", [over], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.minimum(tl.maximum(over, 0.0), 1.0)


@triton.jit
def put(row_ptr, place, value):
    """Store int32 values at places of a row, except where the place is -1."""
    if ASSEMBLY:  # a store of Triton's would pass through shared memory first
        tl.inline_asm_elementwise(
            """
            {
            .reg .pred here;
            .reg .b64 address;
            setp.ge.s32 here, $2, 0;
            mad.wide.s32 address, $2, 4, $1;
            @here st.global.b32 [address], $3;
            mov.b32 $0, 0;
            }
            """,
            "=r,l,r,r",
            [row_ptr.to(tl.int64), place, value],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(row_ptr + place, value, mask=place >= 0)


@triton.jit
def lower_end(shifted, top, want, some, GROUP: tl.constexpr):
    """[BM]: a key that at least `want` (where some) of each row reach, mostly few more: the
    want-th largest of the largest keys of groups of GROUP, or the least key."""
    threshold = 0 * top + (EMPTY + 1)
    lacking = some
    if GROUP > 1:  # the keys of a group belong to one thread
        shape: tl.constexpr = [shifted.shape[0], GROUP, shifted.shape[1] // GROUP]
        numbers = tl.max(tl.reshape(shifted, shape), 1).to(tl.float32, bitcast=True)
        enough = some & (reached(numbers, threshold) >= want)
        lacking = some & (enough == 0)
        top = tl.where(enough, top, threshold)
        reach = 2048  # of a power of two in value, thinly filled at the top of most rows
        while tl.max(top - threshold, 0) > 0:
            middle = tl.maximum((threshold + top + 1) >> 1, top - reach)
            n = reached(numbers, middle)
            threshold = tl.where(n >= want, middle, threshold)
            top = next_top(n, want, middle, top)
            reach = tl.minimum(4 * reach, 1 << 21)
    if tl.max(lacking.to(tl.int32), 0) > 0:
        least = tl.min(tl.where(shifted > EMPTY + NUMBER, shifted, 0x7FFFFFFF), 1)
        threshold = tl.where(lacking, least - NUMBER, threshold)
    return threshold


@triton.constexpr_function
def group_size(columns):
    return max(1, min(8, columns // 128))


@triton.jit
def best(key, want):
    """The `want` largest keys of each row: (the place of each among them, or -1; how many)."""
    shifted = key + NUMBER
    numbers = shifted.to(tl.float32, bitcast=True)
    n_low = reached(numbers, 0 * want + (EMPTY + 1))
    n_high = 0 * want  # how many are larger than `top`
    want = tl.minimum(want, n_low)
    some = want > 0
    top = tl.max(shifted, 1) - NUMBER
    fewer = some & (want < n_low)
    threshold = lower_end(shifted, top, want, fewer, group_size(key.shape[1]))
    n_low = tl.where(fewer, reached(numbers, threshold), n_low)
    threshold = tl.where(some, threshold, 1 << 20)
    n_low = tl.where(some, n_low, 0)
    top = tl.where(n_low == want, threshold, top)
    step = 0
    while tl.max(top - threshold, 0) > 0:
        # Where the counts of both ends, joined by a line, pass `want`.
        share = (n_low - want).to(tl.float32) / tl.maximum(n_low - n_high, 1).to(tl.float32)
        guess = threshold + ((top + 1 - threshold).to(tl.float32) * share).to(tl.int32)
        middle = tl.where(step < GUESSES, guess, (threshold + top + 1) >> 1)
        middle = tl.minimum(tl.maximum(middle, threshold + 1), top)
        n = reached(numbers, middle)
        n_low = tl.where(n >= want, n, n_low)
        n_high = tl.where(n < want, n, n_high)
        threshold = tl.where(n >= want, middle, threshold)
        top = next_top(n, want, middle, top)
        step += 1
    if tl.max(n_low - want, 0) > 0:  # more ties than places
        tie = numbers == number(threshold)[:, None]
        room = want - reached(numbers, threshold + 1)
        late = tl.cumsum(tie.to(tl.int32), 1) > room[:, None]
        numbers = tl.where(tie & late, 0.0, numbers)
    keep = reaches(numbers, threshold).to(tl.int32, bitcast=True) >> 29  # 1.0 to 1
    return tl.cumsum(keep, 1) * keep - 1, want


@triton.jit
def fill(out, want, row_ok, width, BW: tl.constexpr):
    """-1 behind the `want` choices of rows of `width` places; out [BM, 1] pointers."""
    for low in range(0, width, BW):
        slot = low + tl.arange(0, BW)[None, :]
        empty = row_ok[:, None] & (slot >= tl.maximum(want, 0)[:, None]) & (slot < width)
        tl.store(out + slot, tl.full([out.shape[0], BW], -1, tl.int32), mask=empty)


@triton.jit(do_not_specialize=["first_tile", "rows", "n_columns", "most", "width", "n_parents"])
def select_kernel(
    score_ptr,  # [B, H, rows, stride] float32
    column_ptr,  # [B, H, rows, stride] int32, where LISTED: ascending
    count_ptr,  # [B, H, rows] int32, where LISTED
    wanted_ptr,  # [B, H, rows] int32
    docs_ptr,  # [B, S]
    parent_ptr,  # [B, H, rows, n_parents] int32, where PARENTS: ascending
    out_ptr,  # [B, H, rows, width] int32
    fine_ptr,  # [1] int32, set to 0 where a candidate is NaN
    S,
    first_tile,
    rows,
    n_columns,
    stride,
    most,
    width,
    n_parents,
    H: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    RATIO: tl.constexpr,
    RANGE: tl.constexpr,
    LISTED: tl.constexpr,
    PARENTS: tl.constexpr,  # column n is block n % RATIO of the pooling block parents[n // RATIO]
    HAS_DOCS: tl.constexpr,
    HAS_WANTED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    row_ok = row < rows
    entry = tl.program_id(1).to(tl.int64) * rows + row
    first, end = 0 * row, 0 * row + n_columns
    if RANGE:
        b = tl.program_id(1) // H
        first, end = candidate_range(
            b, first_tile + row, docs_ptr, S, row_ok, C, R, WINDOW, SINKS, HAS_DOCS, RATIO
        )
    if LISTED:
        end = tl.load(count_ptr + entry, mask=row_ok, other=0)
    end = tl.where(row_ok, end, 0)
    begin = first // 16 * 16
    column = begin[:, None] + tl.arange(0, BN)[None, :]
    ok = (column >= first[:, None]) & (column < end[:, None])
    place = entry[:, None] * stride + column
    if RANGE or LISTED:  # whole vectors, see chunk
        padded = column < ((end + 15) // 16 * 16)[:, None]
        score = tl.load(score_ptr + place, mask=padded, other=0.0)
    else:
        score = tl.load(score_ptr + place, mask=ok, other=0.0)
    score = tl.where(ok, score, float("-inf"))
    tl.store(fine_ptr, 0, mask=has_nan(score))
    want = wanted_of(wanted_ptr, entry, row_ok, most, HAS_WANTED)
    slot, want = best(ordered(score, True), want)
    keep = slot >= 0
    found = column
    if LISTED:
        found = tl.load(column_ptr + place, mask=keep, other=0)
    if PARENTS:
        parents = parent_ptr + entry[:, None] * n_parents
        parent = tl.load(parents + found // RATIO, mask=keep, other=0)
        found = parent * RATIO + found % RATIO
    out = out_ptr + entry[:, None] * width
    put(out, slot, found)
    fill(out, want, row_ok, width, BW)
