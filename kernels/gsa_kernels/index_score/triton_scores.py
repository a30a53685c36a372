"""Mean keys of blocks, and the scores of blocks at the anchors of query tiles.

A row is one anchor, a column one key block. The blocks an anchor may choose are consecutive,
first .. end - 1 (after the sinks, before the local window), and follow from its position alone,
so nothing about them is stored. Scores are written for those columns; a program whose anchors have
no candidate among its columns writes nothing, and readers must keep to the range.

Products are good to float32, far below the 12 bits that selection compares: 16-bit operands go
through the tensor cores with float32 sums, exactly; a mean of 16-bit keys is the sum of three
16-bit parts (bfloat16: 24 bits, all of a float32) and takes three products; float32 operands take
three TF32 products.

Sigmoids are what limits the speed: a multiprocessor takes an exponential or a reciprocal of 16
numbers in a cycle. So up to four heads of single keys share a reciprocal, as the sum of the
fractions w / (1 + t) is one fraction, whose parts are kept (`joined`): 1.25 such operations a head
in place of 2. Its denominator must stay below 2^124, so no sigmoid of four counts as less than
2^-31, which moves a score by 2^-31 of the weights' sum (2^-62 for float32 factors, of which two
share); weights must stay below 2^31. tanh.approx, one operation, has an error of 2^-11 of its
value: more than the comparison resolves, and none of a small sigmoid's digits.

Legend: B batch, T queries, S keys, J index heads, I index width, H selection heads, C keys per
block, R queries per tile, BM rows and BN columns (or keys) per program.
"""

import os

import triton
import triton.language as tl

# The interpreter knows no assembly.
ASSEMBLY = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")


@triton.jit
def candidate_range(
    b, tile, docs_ptr, S, ok, C: tl.constexpr, R: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, HAS_DOCS: tl.constexpr, RATIO: tl.constexpr = 1
):  # fmt: skip
    """(first, end) block that the anchor of each tile may choose (TileLayout.candidates).

    RATIO above 1: (first, end) pooling block of RATIO blocks that holds one of them.
    """
    anchor = tile * R
    start = anchor * 0
    if HAS_DOCS:
        start = tl.load(docs_ptr + b.to(tl.int64) * S + anchor, mask=ok, other=0).to(tl.int32)
    first = start // C
    if SINKS > 0:
        first = (start + (SINKS + C - 1)) // C
    end = tl.maximum(anchor - (WINDOW - 1), 0) // C
    return first // RATIO, (end + (RATIO - 1)) // RATIO


@triton.jit(do_not_specialize=["n_blocks"])
def pool_kernel(
    k_ptr,  # [B, S, I], `batch_stride` from one of the batch to the next
    docs_ptr,  # [B, S]: first position of each position's document
    out_ptr,  # [B, n_blocks, PARTS, I]: the mean is the sum of its parts
    S,
    batch_stride,
    n_blocks,
    WIDTH: tl.constexpr,
    BI: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,  # keys of one block per step, a power of two
    BB: tl.constexpr,  # blocks per program
    PARTS: tl.constexpr,
    HAS_DOCS: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    k_ptr += b * batch_stride
    n = tl.arange(0, BB * CP)
    i = tl.arange(0, BI)
    row = tl.program_id(0) * BB + n // CP  # block of each key that is loaded
    row_ok = row < n_blocks
    low = row * C
    if HAS_DOCS:
        # Queries that can choose a block belong to its last key's document or a later one.
        last = tl.load(docs_ptr + b * S + row * C + (C - 1), mask=row_ok, other=0).to(tl.int32)
        low = tl.maximum(low, last)
    total = tl.zeros([BB, BI], tl.float32)
    count = tl.zeros([BB], tl.float32)
    for step in range(0, C, CP):
        inside = step + n % CP
        key = row * C + inside
        ok = row_ok & (inside < C) & (key >= low)
        offset = key.to(tl.int64)[:, None] * WIDTH + i[None, :]
        k = tl.load(k_ptr + offset, mask=ok[:, None] & (i < WIDTH)[None, :], other=0.0)
        total += tl.sum(tl.reshape(k.to(tl.float32), [BB, CP, BI]), 1)
        count += tl.sum(tl.reshape(ok.to(tl.float32), [BB, CP]), 1)
    block = tl.program_id(0) * BB + tl.arange(0, BB)
    rest = total / tl.maximum(count, 1.0)[:, None]
    line = (b * n_blocks + block)[:, None] * (PARTS * WIDTH) + i[None, :]
    out_ok = (block < n_blocks)[:, None] & (i < WIDTH)[None, :]
    for part in tl.static_range(PARTS):
        held = rest.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + line + part * WIDTH, held, mask=out_ok)
        rest -= held.to(tl.float32)


@triton.jit
def unpacked(k, q_ptr):
    """FP8 keys in the type of the queries, exactly; others as they are."""
    if k.dtype == tl.float8e4nv:
        k = k.to(q_ptr.dtype.element_ty)
    return k


@triton.jit
def product(q, k, acc, WIDE: tl.constexpr):
    """acc + q [BM, I] . k [BN, I] in float32."""
    if WIDE:
        q, k = q.to(tl.float32), k.to(tl.float32)
    return tl.dot(q, tl.trans(k), acc, input_precision="tf32x3")


@triton.jit
def activated(x, SIGMOID: tl.constexpr):
    """The activation; for the sigmoid x is -log2(e) times its argument."""
    if SIGMOID:
        return reciprocal(1.0 + tl.exp2(x))
    return tl.where(x < 0.0, 0.0, x)  # keeps NaN, as a maximum would not


@triton.jit
def scaled(x, slope, bias, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        return tl.fma(x, slope + tl.zeros_like(x), bias + tl.zeros_like(x))
    return x * slope


@triton.jit
def reciprocal(x):
    """1 / x to an ulp, for x of 1 or more; 0 of infinity."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def joined(
    x, weight, over, under, FIRST: tl.constexpr, GROUP: tl.constexpr, SIGMOID: tl.constexpr
):
    """over / under + weight * activation of x (see `activated`), as (over, under); under stays 1
    but for sigmoids, of which GROUP may be joined. FIRST: over / under is 0 / 1."""
    if SIGMOID:
        if GROUP > 1:  # of NaN, NaN
            x = tl.minimum(x, 124.0 / GROUP, propagate_nan=tl.PropagateNan.ALL)
        t = tl.exp2(x)
        if FIRST:
            return weight + over, 1.0 + t
        return tl.fma(weight + tl.zeros_like(x), under, tl.fma(over, t, over)), tl.fma(
            under, t, under
        )
    return tl.fma(weight + tl.zeros_like(x), tl.where(x < 0.0, 0.0, x), over), under


@triton.jit
def ratio(over, under, SIGMOID: tl.constexpr):
    if SIGMOID:
        return over * reciprocal(under)
    return over


@triton.constexpr_function
def group_of(heads, most):
    """How many of `heads` heads join: a divisor of their number."""
    return max(n for n in range(1, most + 1) if heads % n == 0)


@triton.jit
def largest(score, key_ok, BM: tl.constexpr, CB: tl.constexpr, CP: tl.constexpr):
    """[BM, CB]: the largest of each block's CP scores; NaN if one of them is."""
    bad = tl.reshape(((score != score) & key_ok[None, :]).to(tl.int32), [BM, CB, CP])
    score = tl.where(key_ok[None, :] & (score == score), score, float("-inf"))
    score = tl.max(tl.reshape(score, [BM, CB, CP]), 2)
    return tl.where(tl.max(bad, 2) > 0, float("nan"), score)


@triton.jit
def own_scores(
    q_ptr, k_ptr, weight_ptr, bias_ptr, q_line, k_row, ok, slope, unit, h, JH: tl.constexpr,
    WIDTH: tl.constexpr, BI: tl.constexpr, SIGMOID: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """[BM] scores of one key for each row."""
    i = tl.arange(0, BI)
    there = ok[:, None] & (i < WIDTH)[None, :]
    k = tl.load(k_ptr + k_row[:, None] * WIDTH + i, mask=there, other=0.0).to(tl.float32)
    score = tl.zeros([ok.shape[0]], tl.float32)
    for j in range(JH):
        q = tl.load(q_ptr + (q_line + j)[:, None] * WIDTH + i, mask=there, other=0.0)
        x = tl.sum(q.to(tl.float32) * k, 1) * slope
        if HAS_BIAS:
            x += tl.load(bias_ptr + h * JH + j).to(tl.float32) * unit
        weight = tl.load(weight_ptr + q_line + j, mask=ok, other=0.0)
        score += weight.to(tl.float32) * activated(x, SIGMOID)
    return score


@triton.jit(
    do_not_specialize=["T", "q_start", "first_tile", "rows", "key_rows", "edge_rows", "edge_start"]
)
def score_kernel(
    q_ptr,  # [B, T, J, I]
    k_ptr,  # [B, key_rows, PARTS, I]: mean keys, or single ones where SINGLE; see batch_stride
    weight_ptr,  # [B, T, J]
    bias_ptr,  # [J]
    docs_ptr,  # [B, S]
    edge_ptr,  # [B, edge_rows, I] keys pooled up to the positions from edge_start on, where EDGE
    out_ptr,  # [B, H, rows, stride] float32
    T,
    S,
    q_start,
    first_tile,
    rows,
    key_rows,
    batch_stride,  # of k
    edge_rows,
    edge_start,
    stride,
    scale,
    J: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    BI: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    PARTS: tl.constexpr,
    SINGLE: tl.constexpr,  # a block's score is the largest of its keys'
    CP: tl.constexpr,  # C as a power of two where SINGLE, else 1
    RATIO: tl.constexpr,  # key blocks per column
    EDGE: tl.constexpr,  # columns are pooling blocks: the one that a row's window cuts is its own
    SIGMOID: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    CB: tl.constexpr = BN // CP  # columns
    JH: tl.constexpr = J // H
    GROUP: tl.constexpr = group_of(JH, 1 if PARTS > 1 else 2 if WIDE else 4)
    b, h = tl.program_id(2) // H, tl.program_id(2) % H
    k_ptr += b.to(tl.int64) * batch_stride
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    row_ok = row < rows
    tile = first_tile + row
    first, end = candidate_range(
        b, tile, docs_ptr, S, row_ok, C, R, WINDOW, SINKS, HAS_DOCS, RATIO
    )
    end = tl.where(row_ok, end, 0)
    first = tl.where(row_ok, first, 1 << 30)
    column_0 = tl.program_id(0) * CB
    if (column_0 < tl.max(end, 0)) & (column_0 + CB > tl.min(first, 0)):
        n = tl.arange(0, BN)
        i = tl.arange(0, BI)
        block = column_0 + n // CP
        if SINGLE:
            key = block * C + n % CP
            key_ok = (n % CP < C) & (block < tl.max(end, 0))
            if HAS_DOCS:
                last = tl.load(
                    docs_ptr + b.to(tl.int64) * S + block * C + (C - 1), mask=key_ok, other=0
                )
                key_ok &= key >= last.to(tl.int32)
        else:
            key = block
            key_ok = key < key_rows
        k_line = key.to(tl.int64)[:, None] * (PARTS * WIDTH) + i[None, :]
        k_mask = key_ok[:, None] & (i < WIDTH)[None, :]
        k_0 = unpacked(tl.load(k_ptr + k_line, mask=k_mask, other=0.0), q_ptr)
        if PARTS == 3:
            k_1 = tl.load(k_ptr + k_line + WIDTH, mask=k_mask, other=0.0)
            k_2 = tl.load(k_ptr + k_line + 2 * WIDTH, mask=k_mask, other=0.0)
        q_line = (b.to(tl.int64) * T + (tile * R - q_start)) * J + h * JH
        score = tl.zeros([BM, BN], tl.float32)
        unit = -1.4426950408889634 if SIGMOID else 1.0  # the exponential's, in powers of 2
        slope = scale * unit
        for first_head in range(0, JH, GROUP):
            over = tl.zeros([BM, BN], tl.float32)
            under = tl.full([BM, BN], 1.0, tl.float32)
            for inner in tl.static_range(GROUP):
                j = first_head + inner
                q_at = (q_line + j)[:, None] * WIDTH + i[None, :]
                q = tl.load(q_ptr + q_at, mask=row_ok[:, None] & (i < WIDTH)[None, :], other=0.0)
                x = tl.zeros([BM, BN], tl.float32)
                if PARTS == 3:
                    x = product(q, k_2, x, WIDE)
                    x = product(q, k_1, x, WIDE)
                x = product(q, k_0, x, WIDE)
                bias = 0.0
                if HAS_BIAS:
                    bias = tl.load(bias_ptr + h * JH + j).to(tl.float32) * unit
                x = scaled(x, slope, bias, HAS_BIAS)
                weight = tl.load(weight_ptr + q_line + j, mask=row_ok, other=0.0)
                over, under = joined(
                    x, weight.to(tl.float32)[:, None], over, under, inner == 0, GROUP, SIGMOID
                )
            score += ratio(over, under, SIGMOID)
        if SINGLE:
            score = largest(score, key_ok, BM, CB, CP)
        column = column_0 + tl.arange(0, CB)
        if EDGE:
            # The last pooling block of each row ends where its local window begins.
            local = tl.maximum(tile * R - (WINDOW - 1), 0) // C * C
            cut = tl.where(row_ok & (local > 0), (local - 1) // (C * RATIO), -1)
            hit = (cut >= column_0) & (cut < column_0 + CB)
            if tl.max(hit.to(tl.int32), 0) > 0:
                edge = b.to(tl.int64) * edge_rows + (local - 1 - edge_start)
                whole = own_scores(
                    q_ptr, edge_ptr, weight_ptr, bias_ptr, q_line, edge,
                    hit, slope, unit, h, JH, WIDTH, BI, SIGMOID, HAS_BIAS
                )  # fmt: skip
                score = tl.where(column[None, :] == cut[:, None], whole[:, None], score)
        chosen = (column[None, :] >= first[:, None]) & (column[None, :] < end[:, None])
        out = (tl.program_id(2).to(tl.int64) * rows + row) * stride
        tl.store(
            out_ptr + out[:, None] + column[None, :],
            tl.where(chosen, score, float("-inf")),
            mask=row_ok[:, None] & (column < stride)[None, :],
        )
