"""Coarse to fine: keys pooled up to each position, and exact scores inside each row's survivors.

A row lists the pooling blocks whose key blocks are to be scored, ascending. Neighbouring rows list
mostly the same ones, so a program takes BM rows and walks through the union of their lists: the
least block that any row still has is next, its keys are loaded once and scored for all rows, and
those that list it store them. A row's scores lie behind each other in the order of its list.
What is walked is split into parts, at entries of the program's last row, where rows are few.

Products are as exact as those of triton_scores.

Legend: as there; P survivors per row, RATIO key blocks per pooling block, JP index heads of a
selection head as a power of two.
"""

import triton
import triton.language as tl

from .triton_scores import activated, candidate_range, largest, product, unpacked

NONE = tl.constexpr(1 << 30)  # above every pooling block


@triton.jit(do_not_specialize=["S"])
def running_kernel(
    k_ptr,  # [B, S, I], `batch_stride` from one of the batch to the next
    docs_ptr,  # [B, S]: first position of each position's document
    out_ptr,  # [B, S, FOLDS, I]
    S,
    batch_stride,
    WIDTH: tl.constexpr,
    BI: tl.constexpr,
    POOL: tl.constexpr,
    MEAN: tl.constexpr,  # else the maximum
    FOLDS: tl.constexpr,  # 2: maximum and minimum
    HAS_DOCS: tl.constexpr,
):
    """One pooling block, key by key: what a position gets is the same whatever comes after it."""
    i = tl.arange(0, BI)
    b = tl.program_id(1).to(tl.int64)
    k_ptr += b * batch_stride
    begin = tl.program_id(0) * POOL
    held = tl.zeros([BI], tl.float32)
    low = tl.zeros([BI], tl.float32)
    count = tl.zeros([BI], tl.float32)
    for step in tl.range(0, POOL, num_stages=8):
        position = begin + step
        ok = (i < WIDTH) & (position + i * 0 < S)
        at = b * S + position
        k = tl.load(k_ptr + position.to(tl.int64) * WIDTH + i, mask=ok, other=0.0).to(tl.float32)
        new = position == begin
        if HAS_DOCS:
            doc = tl.load(docs_ptr + b * S + tl.minimum(position, S - 1))
            new |= doc.to(tl.int32) == position
        if MEAN:
            held = tl.where(new, k, held + k)
            count = tl.where(new, 1.0, count + 1.0)
            pooled = tl.div_rn(held, count)
        else:
            held = tl.where(new, k, tl.maximum(held, k, propagate_nan=tl.PropagateNan.ALL))
            pooled = held
        out = out_ptr + at * (FOLDS * WIDTH) + i
        tl.store(out, pooled.to(out_ptr.dtype.element_ty), mask=ok)
        if FOLDS == 2:
            low = tl.where(new, k, tl.minimum(low, k, propagate_nan=tl.PropagateNan.ALL))
            tl.store(out + WIDTH, low.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def entries(list_ptr, place, ok):
    """Pooling blocks at some places of lists, NONE behind their ends."""
    found = tl.load(list_ptr + place, mask=ok, other=-1)
    return tl.where(found < 0, NONE, found)


@triton.jit(do_not_specialize=["T", "q_start", "first_tile", "rows", "key_rows"])
def survivor_kernel(
    q_ptr,  # [B, T, J, I]
    k_ptr,  # [B, key_rows, PARTS, I]: mean keys, or single ones where SINGLE or C is 1;
    # see batch_stride
    weight_ptr,  # [B, T, J]
    bias_ptr,  # [J]
    docs_ptr,  # [B, S]
    list_ptr,  # [B, H, rows, P] int32: pooling blocks, ascending, -1 last
    out_ptr,  # [B, H, rows, P * RATIO] float32
    T,
    S,
    q_start,
    first_tile,
    rows,
    key_rows,
    batch_stride,  # of k
    P,
    span,  # entries of the last row's list per split
    scale,
    J: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    BI: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    RATIO: tl.constexpr,
    PARTS: tl.constexpr,
    SINGLE: tl.constexpr,
    CP: tl.constexpr,
    SIGMOID: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    BM: tl.constexpr,
    JP: tl.constexpr,
    BN: tl.constexpr,
):
    CB: tl.constexpr = BN // CP  # columns per step
    JH: tl.constexpr = J // H
    b, h = tl.program_id(2) // H, tl.program_id(2) % H
    k_ptr += b.to(tl.int64) * batch_stride
    row_0 = tl.program_id(0) * BM
    row = row_0 + tl.arange(0, BM)
    row_ok = row < rows
    tile = first_tile + row
    first, end = candidate_range(b, tile, docs_ptr, S, row_ok, C, R, WINDOW, SINKS, HAS_DOCS)
    entry = tl.program_id(2).to(tl.int64) * rows + row
    lists = list_ptr + entry * P

    # The queries of all heads, in the rows of one product.
    m = tl.arange(0, BM * JP)
    i = tl.arange(0, BI)
    n = tl.arange(0, BN)
    q_row = row_0 + m // JP
    q_ok = (q_row < rows) & (m % JP < JH)
    q_line = (b.to(tl.int64) * T + ((first_tile + q_row) * R - q_start)) * J + h * JH + m % JP
    q_mask = q_ok[:, None] & (i < WIDTH)[None, :]
    q = tl.load(q_ptr + q_line[:, None] * WIDTH + i[None, :], mask=q_mask, other=0.0)
    weight = tl.load(weight_ptr + q_line, mask=q_ok, other=0.0).to(tl.float32)
    unit = -1.4426950408889634 if SIGMOID else 1.0  # the exponential's, in powers of 2
    slope = scale * unit
    bias = tl.zeros([BM * JP], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + h * JH + m % JP, mask=q_ok, other=0.0).to(tl.float32) * unit

    split, splits = tl.program_id(1), tl.num_programs(1)
    last = tl.minimum(row_0 + BM, rows) - 1
    pivot = list_ptr + (tl.program_id(2).to(tl.int64) * rows + last) * P
    begin = tl.where(split > 0, entries(pivot, split * span, split > 0), 0)
    stop = entries(pivot, (split + 1) * span, split + 1 < splits)
    place = tl.zeros([BM], tl.int32)
    for low in range(0, tl.where(split > 0, P, 0), 32):
        slot = low + tl.arange(0, 32)[None, :]
        block = entries(lists[:, None], slot, row_ok[:, None] & (slot < P))
        place += tl.sum((block < begin).to(tl.int32), 1)

    current = entries(lists, place, row_ok & (place < P))
    pool = tl.min(current, 0)
    while pool < stop:
        member = current == pool
        out = out_ptr + (entry * P + place) * RATIO
        for step in range(0, RATIO * CP, BN):
            inside = (step + n) // CP
            key = pool * RATIO + inside
            key_ok = inside < RATIO
            if SINGLE:
                within = (step + n) % CP
                block = key
                key = block * C + within
                key_ok &= (within < C) & (key < key_rows)
                if HAS_DOCS:
                    owner = tl.load(
                        docs_ptr + b.to(tl.int64) * S + block * C + (C - 1),
                        mask=key_ok & (block * C + (C - 1) < S),
                        other=0,
                    )
                    key_ok &= key >= owner.to(tl.int32)
            else:
                key_ok &= key < key_rows
            k_line = key.to(tl.int64)[:, None] * (PARTS * WIDTH) + i[None, :]
            k_mask = key_ok[:, None] & (i < WIDTH)[None, :]
            x = tl.zeros([BM * JP, BN], tl.float32)
            if PARTS == 3:
                k_2 = tl.load(k_ptr + k_line + 2 * WIDTH, mask=k_mask, other=0.0)
                x = product(q, k_2, x, WIDE)
                k_1 = tl.load(k_ptr + k_line + WIDTH, mask=k_mask, other=0.0)
                x = product(q, k_1, x, WIDE)
            k_0 = unpacked(tl.load(k_ptr + k_line, mask=k_mask, other=0.0), q_ptr)
            x = product(q, k_0, x, WIDE) * slope + bias[:, None]
            x = weight[:, None] * activated(x, SIGMOID)
            score = tl.sum(tl.reshape(x, [BM, JP, BN]), 1)
            if SINGLE:
                score = largest(score, key_ok, BM, CB, CP)
            inner = step // CP + tl.arange(0, CB)
            column = pool * RATIO + inner
            chosen = (column[None, :] >= first[:, None]) & (column[None, :] < end[:, None])
            tl.store(
                out[:, None] + inner[None, :],
                tl.where(chosen, score, float("-inf")),
                mask=member[:, None] & (inner < RATIO)[None, :],
            )
        place += member.to(tl.int32)
        following = entries(lists, place, member & (place < P))
        current = tl.where(member, following, current)
        pool = tl.min(current, 0)

    if split == splits - 1:  # what lies behind the end of a list
        for low in range(tl.min(tl.where(row_ok, place, P), 0) * RATIO, P * RATIO, 256):
            slot = low + tl.arange(0, 256)[None, :]
            empty = row_ok[:, None] & (slot >= place[:, None] * RATIO) & (slot < P * RATIO)
            out = out_ptr + (entry * P * RATIO)[:, None] + slot
            tl.store(out, tl.full([BM, 256], float("-inf"), tl.float32), mask=empty)
