"""Statistics of the scores of single keys, of which none is written (definitions: statistics.py).

`part_kernel` scores the keys of one SEGMENT for some rows and keeps sums of distances from a
number near the row's scores, so that nothing cancels in float32; `merge_kernel` joins a row's
segments in float64. The number is the mean of the candidates in the first step that has some.
Segments and steps start at multiples of their lengths: a row's sums, in every bit, follow from its
own candidates, however many rows or keys the call has.

With r the ratio of a score (TINY if that is more) to a number c, g = r log r - r + 1, m the row's
mean and m_s, n_s those of a segment's candidates, of n in all,
    n (log n - H) = sum over segments of (c / m) sum g + n_s (1 - c / m + (m_s / m) log(c / m)).

Legend: B batch, H selection heads, J index heads, R queries per tile, BM rows and BN keys per
step, FIELDS numbers kept of a row's segment (see part_kernel).
"""

import triton
import triton.language as tl

from gsa_kernels.index_score.triton_scores import ASSEMBLY, candidate_range, unpacked

from .triton_filter import queries, scores_of

TINY = tl.constexpr(2.0**-100)  # scores, where their ratios count, are no smaller
NEAR = tl.constexpr(0.25)  # r log r - r + 1 cancels where r is nearer to 1


@triton.jit
def log_2(x):
    if ASSEMBLY:  # one instruction, good to 2^-22 of values this far from 0
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.log2(x)


@triton.jit
def entropy_term(x, r):
    """r log r - r + 1 of r = 1 + x."""
    series = 1 / 42 - x * (1 / 56)
    series = 1 / 30 - x * series
    series = 1 / 20 - x * series
    series = 1 / 12 - x * series
    series = 1 / 6 - x * series
    series = 0.5 - x * series
    far = r * (log_2(r) * 0.6931471805599453) - x
    return tl.where(tl.abs(x) < NEAR, x * x * series, far)


@triton.jit(
    do_not_specialize=["T", "q_start", "first_tile", "rows", "key_rows", "segments"],
)
def part_kernel(
    q_ptr,  # [B, T, J, I]
    k_ptr,  # [B, key_rows, I]; see batch_stride
    weight_ptr,  # [B, T, J]
    bias_ptr,  # [J]
    docs_ptr,  # [B, S]
    part_ptr,  # [B, H, segments, FIELDS, rows] float32: a number c near the scores, sums of
    # score - c and its square, the largest score; where ENTROPY, of scores of at least TINY,
    # such a c and sums of score - c and of r log r - r + 1
    T,
    S,
    q_start,
    first_tile,
    rows,
    key_rows,
    batch_stride,  # of k
    segments,
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
    ENTROPY: tl.constexpr,
    FIELDS: tl.constexpr,
    SEGMENT: tl.constexpr,  # keys, a multiple of BN
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    JH: tl.constexpr = J // H
    b, h = tl.program_id(2) // H, tl.program_id(2) % H
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    row_ok = row < rows
    tile = first_tile + row
    first, end = candidate_range(b, tile, docs_ptr, S, row_ok, 1, R, WINDOW, SINKS, HAS_DOCS)
    low = tl.program_id(1) * SEGMENT
    first = tl.maximum(first, low)
    end = tl.where(row_ok, tl.minimum(end, low + SEGMENT), 0)
    some = first < end
    begin = tl.min(tl.where(some, first, low + SEGMENT), 0) // BN * BN
    stop = tl.max(tl.where(some, end, 0), 0)
    # Between these all keys are candidates of all rows.
    begun = tl.max(tl.where(some, first, 0), 0)
    ended = tl.min(tl.where(some, end, low + SEGMENT), 0)
    if begin < stop:
        unit = -1.4426950408889634 if SIGMOID else 1.0
        q_line = (b.to(tl.int64) * T + (tile * R - q_start)) * J + h * JH
        qs, weights, biases = queries(
            q_ptr, weight_ptr, bias_ptr, q_line, row_ok, h, unit, JH, WIDTH, BI, HAS_BIAS
        )
        n = tl.arange(0, BN)
        i = tl.arange(0, BI)
        k_at = n[:, None] * WIDTH + i[None, :]
        k_ptr += b.to(tl.int64) * batch_stride
        near = tl.zeros([BM], tl.float32)
        total = tl.zeros([BM], tl.float32)
        square = tl.zeros([BM], tl.float32)
        largest = tl.full([BM], float("-inf"), tl.float32)
        base = tl.full([BM], TINY, tl.float32)
        excess = tl.zeros([BM], tl.float32)
        terms = tl.zeros([BM], tl.float32)
        for column_0 in tl.range(begin, stop, BN, num_stages=STAGES):
            k_mask = (column_0 + n < key_rows)[:, None] & (i < WIDTH)[None, :]
            k_line = tl.cast(column_0, tl.int64) * WIDTH
            k = unpacked(tl.load(k_ptr + k_line + k_at, mask=k_mask, other=0.0), q_ptr)
            score = scores_of(qs, weights, biases, k, slope=scale * unit, JH=JH, SIGMOID=SIGMOID,
                              WIDE=WIDE, HAS_BIAS=HAS_BIAS)  # fmt: skip
            above = score
            if ENTROPY:
                above = tl.maximum(score, TINY)
            if (column_0 <= begun) | (column_0 + BN > ended):
                column = (column_0 + n)[None, :]
                there = (column >= first[:, None]) & (column < end[:, None])
                here = tl.minimum(end, column_0 + BN) - tl.maximum(first, column_0)
                share = 1.0 / tl.maximum(here, 1).to(tl.float32)
                starts = some & (first >= column_0) & (first < column_0 + BN)
                mean = tl.sum(tl.where(there, score, 0.0), 1) * share
                # Rounded up it would pass for the largest below.
                mean = tl.minimum(mean, tl.max(tl.where(there, score, float("-inf")), 1))
                near = tl.where(starts, mean, near)
                score = tl.where(there, score, near[:, None])
                if ENTROPY:
                    mean = tl.sum(tl.where(there, above, 0.0), 1) * share
                    base = tl.where(starts, mean, base)
                    above = tl.where(there, above, base[:, None])
            highest = tl.maximum(largest, tl.max(score, 1))
            largest = tl.where(first < column_0 + BN, highest, largest)
            off = score - near[:, None]
            total += tl.sum(off, 1)
            square += tl.sum(off * off, 1)
            if ENTROPY:
                off = above - base[:, None]
                excess += tl.sum(off, 1)
                inverse = (1.0 / base)[:, None]
                terms += tl.sum(entropy_term(off * inverse, above * inverse), 1)
        line = tl.program_id(2).to(tl.int64) * segments + tl.program_id(1)
        part = part_ptr + line * (FIELDS * rows) + row
        tl.store(part, near, mask=some)
        tl.store(part + rows, total, mask=some)
        tl.store(part + 2 * rows, square, mask=some)
        tl.store(part + 3 * rows, largest, mask=some)
        if ENTROPY:
            tl.store(part + 4 * rows, base, mask=some)
            tl.store(part + 5 * rows, excess, mask=some)
            tl.store(part + 6 * rows, terms, mask=some)


@triton.jit
def segment_of(
    part_ptr, first, end, segment, rows, FIELDS: tl.constexpr, SEGMENT: tl.constexpr
):  # fmt: skip
    """(pointers to a segment's numbers, how many candidates it holds) of rows."""
    low = segment * SEGMENT
    n = tl.minimum(end, low + SEGMENT) - tl.maximum(first, low)
    return part_ptr + tl.cast(segment, tl.int64) * (FIELDS * rows), tl.maximum(n, 0)


@triton.jit(do_not_specialize=["first_tile", "rows", "segments"])
def merge_kernel(
    part_ptr,  # as part_kernel's
    docs_ptr,  # [B, S]
    out_ptr,  # [5, B, H, rows] float32: count, mean, variance, max and, where ENTROPY, entropy
    S,
    first_tile,
    rows,
    segments,
    H: tl.constexpr,
    R: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    ENTROPY: tl.constexpr,
    FIELDS: tl.constexpr,
    SEGMENT: tl.constexpr,  # keys, a multiple of BN
    BM: tl.constexpr,
):
    list_ = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    row_ok = row < rows
    first, end = candidate_range(
        tl.program_id(1) // H, first_tile + row, docs_ptr, S, row_ok, 1, R, WINDOW, SINKS, HAS_DOCS
    )
    end = tl.where(row_ok, end, 0)
    first = tl.minimum(first, end)
    part_ptr += list_ * segments * FIELDS * rows + row
    count = tl.maximum(end - first, 0)
    number = tl.maximum(count, 1).to(tl.float64)
    low = tl.min(first, 0) // SEGMENT
    stop = (tl.max(end, 0) + (SEGMENT - 1)) // SEGMENT
    total = tl.zeros([BM], tl.float64)
    positive = tl.zeros([BM], tl.float64)
    largest = tl.full([BM], float("-inf"), tl.float32)
    for segment in range(low, stop):
        part, n = segment_of(part_ptr, first, end, segment, rows, FIELDS, SEGMENT)
        there = n > 0
        near = tl.load(part, mask=there, other=0.0).to(tl.float64)
        total += n * near + tl.load(part + rows, mask=there, other=0.0)
        here = tl.load(part + 3 * rows, mask=there, other=float("-inf"))
        largest = tl.maximum(largest, here)
        if ENTROPY:
            base = tl.load(part + 4 * rows, mask=there, other=0.0).to(tl.float64)
            positive += n * base + tl.load(part + 5 * rows, mask=there, other=0.0)
    mean = total / number
    mass = positive / number
    mass = tl.where(count > 0, mass, 1.0)
    square = tl.zeros([BM], tl.float64)
    gap = tl.zeros([BM], tl.float64)
    for segment in range(low, stop):
        part, n = segment_of(part_ptr, first, end, segment, rows, FIELDS, SEGMENT)
        there = n > 0
        away = tl.load(part, mask=there, other=0.0).to(tl.float64) - mean
        sums = tl.load(part + rows, mask=there, other=0.0).to(tl.float64)
        square += tl.load(part + 2 * rows, mask=there, other=0.0) + away * (2 * sums + n * away)
        if ENTROPY:
            base = tl.load(part + 4 * rows, mask=there, other=1.0).to(tl.float64)
            excess = tl.load(part + 5 * rows, mask=there, other=0.0).to(tl.float64)
            terms = tl.load(part + 6 * rows, mask=there, other=0.0).to(tl.float64)
            ratio = base / mass
            own = n * base + excess
            gap += ratio * terms + (n * (1.0 - ratio) + own / mass * tl.log(ratio))
    size = tl.num_programs(1).to(tl.int64) * rows  # of a statistic
    out = out_ptr + list_ * rows + row
    tl.store(out, count.to(tl.float32), mask=row_ok)
    tl.store(out + size, mean.to(tl.float32), mask=row_ok)
    variance = tl.maximum(square, 0.0) / number
    tl.store(out + 2 * size, variance.to(tl.float32), mask=row_ok)
    tl.store(out + 3 * size, tl.where(count > 0, largest, 0.0), mask=row_ok)
    if ENTROPY:
        entropy = -tl.maximum(gap, 0.0) / number
        tl.store(out + 4 * size, entropy.to(tl.float32), mask=row_ok)
