"""Scores of listed key blocks for some query rows, and their gradients.

    score[n] = sum_j w[j] act(q[j] . k[block n] * scale + bias[j])

A program takes one row (a query tile's anchor) and BN of its slots and gathers their keys: one
product of [BN, D] keys with the row's J queries. Products are exact or of about float32's
precision: 16-bit operands multiply as they are, mixed ones as three TF32 products.

Legend: B batch, T queries, M key blocks, J index heads, D index width, HS selection heads, Q rows,
N slots per row.
"""

import triton
import triton.language as tl

from .triton_scores import unpacked


@triton.jit
def load_row(
    q_ptr, w_ptr, bias_ptr, tiles_ptr, b, hs, i, T, J: tl.constexpr, D: tl.constexpr,
    HS: tl.constexpr, R: tl.constexpr, BJ: tl.constexpr, BI: tl.constexpr,
    HAS_TILES: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """q [BJ, BI], weight [BJ] and bias [BJ] of the heads that row i's selection head hs has."""
    JH: tl.constexpr = J // HS
    tile = i
    if HAS_TILES:
        tile = tl.load(tiles_ptr + i).to(tl.int32)
    j, e = tl.arange(0, BJ), tl.arange(0, BI)
    head, j_ok = hs * JH + j, j < JH
    at = (b.to(tl.int64) * T + tile * R) * J + head
    q = tl.load(q_ptr + at[:, None] * D + e, mask=j_ok[:, None] & (e < D), other=0.0)
    weight = tl.load(w_ptr + at, mask=j_ok, other=0.0).to(tl.float32)
    bias = tl.zeros([BJ], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + head, mask=j_ok, other=0.0).to(tl.float32)
    return q, weight, bias


@triton.jit
def load_blocks(k_ptr, q_ptr, block_ptr, b, n, last, M, D: tl.constexpr, BI: tl.constexpr):
    """(block numbers [BN], -1 where there is none; their keys [BN, BI])."""
    e = tl.arange(0, BI)
    block = tl.load(block_ptr + n, mask=n < last, other=-1).to(tl.int32)
    at = (b.to(tl.int64) * M + block) * D
    ok = (block >= 0)[:, None] & (e < D)
    return block, unpacked(tl.load(k_ptr + at[:, None] + e, mask=ok, other=0.0), q_ptr)


@triton.jit
def activation(q, k, bias, scale, SIGMOID: tl.constexpr, SAME: tl.constexpr, WIDE: tl.constexpr):
    """(act, d act / d logit), both [BN, BJ]. SAME: both operands have the same 16-bit type."""
    if SAME:
        s = tl.dot(k, tl.trans(q))
    else:
        s = tl.dot(k.to(tl.float32), tl.trans(q.to(tl.float32)), input_precision=WIDE)
    s = s * scale + bias[None, :]
    if SIGMOID:
        act = 1.0 / (1.0 + tl.exp(-s))
        return act, act * (1.0 - act)
    # Of a NaN the maximum would be 0.
    return tl.where(s < 0, 0.0, s), tl.where(s > 0, 1.0, 0.0)


@triton.jit
def scores_kernel(
    q_ptr,  # [B, T, J, D]
    k_ptr,  # [B, M, D]
    w_ptr,  # [B, T, J]
    bias_ptr,  # [J]
    block_ptr,  # [B, HS, Q, N]
    tiles_ptr,  # [Q]: the row of line i is tiles[i] R, or i R
    score_ptr,  # [B, HS, Q, N] float32
    T,
    M,
    Q,
    N,
    scale,
    J: tl.constexpr,
    D: tl.constexpr,
    HS: tl.constexpr,
    R: tl.constexpr,
    BJ: tl.constexpr,
    BI: tl.constexpr,
    BN: tl.constexpr,
    HAS_TILES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SIGMOID: tl.constexpr,
    SAME: tl.constexpr,
    WIDE: tl.constexpr,
):
    line = tl.program_id(0)
    i, hs, b = line % Q, line // Q % HS, line // (Q * HS)
    q, weight, bias = load_row(
        q_ptr, w_ptr, bias_ptr, tiles_ptr, b, hs, i, T, J, D, HS, R, BJ, BI, HAS_TILES, HAS_BIAS
    )
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    list_base = block_ptr + line.to(tl.int64) * N
    block, k = load_blocks(k_ptr, q_ptr, list_base, b, n, N, M, D, BI)
    act, _ = activation(q, k, bias, scale, SIGMOID, SAME, WIDE)
    score = tl.sum(act * weight[None, :], 1)
    at = score_ptr + line.to(tl.int64) * N + n
    tl.store(at, tl.where(block >= 0, score, float("-inf")), mask=n < N)


@triton.jit
def gradient_kernel(
    q_ptr,
    k_ptr,
    w_ptr,
    bias_ptr,
    block_ptr,
    tiles_ptr,
    dscore_ptr,  # [B, HS, Q, N] float32
    dq_ptr,  # [SPLITS, B, ROWS, J, D]: line i is row i STEP
    dk_ptr,  # [B, M, D] float32, zero
    dw_ptr,  # [SPLITS, B, ROWS, J]
    dbias_ptr,  # [SPLITS, B, Q, J] float32
    T,
    M,
    Q,
    N,
    ROWS,
    span,  # slots of a split, a multiple of BN
    scale,
    J: tl.constexpr,
    D: tl.constexpr,
    HS: tl.constexpr,
    R: tl.constexpr,
    STEP: tl.constexpr,
    BJ: tl.constexpr,
    BI: tl.constexpr,
    BN: tl.constexpr,
    HAS_TILES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SIGMOID: tl.constexpr,
    SAME: tl.constexpr,
    WIDE: tl.constexpr,
):
    JH: tl.constexpr = J // HS
    line, split = tl.program_id(0), tl.program_id(1)
    i, hs, b = line % Q, line // Q % HS, line // (Q * HS)
    q, weight, bias = load_row(
        q_ptr, w_ptr, bias_ptr, tiles_ptr, b, hs, i, T, J, D, HS, R, BJ, BI, HAS_TILES, HAS_BIAS
    )
    q_wide = q.to(tl.float32)
    list_base = block_ptr + line.to(tl.int64) * N
    last = tl.minimum((split + 1) * span, N)
    e = tl.arange(0, BI)
    dq = tl.zeros([BJ, BI], tl.float32)
    dw = tl.zeros([BN, BJ], tl.float32)
    dbias = tl.zeros([BN, BJ], tl.float32)
    for low in tl.range(split * span, last, BN, num_stages=1):
        n = low + tl.arange(0, BN)
        block, k = load_blocks(k_ptr, q_ptr, list_base, b, n, last, M, D, BI)
        act, slope = activation(q, k, bias, scale, SIGMOID, SAME, WIDE)
        there = block >= 0
        d = tl.load(dscore_ptr + line.to(tl.int64) * N + n, mask=there, other=0.0)
        dw += act * d[:, None]
        ds = slope * weight[None, :] * d[:, None]
        dbias += ds
        dq = tl.dot(tl.trans(ds), k.to(tl.float32), dq, input_precision=WIDE)
        dk = tl.dot(ds, q_wide, input_precision=WIDE) * scale
        at = (b.to(tl.int64) * M + block)[:, None] * D + e
        tl.atomic_add(dk_ptr + at, dk, mask=there[:, None] & (e < D), sem="relaxed")
    j = tl.arange(0, BJ)
    j_ok = j < JH
    batch = tl.num_programs(0) // (Q * HS)
    first = split.to(tl.int64) * batch + b
    head = hs * JH + j
    at = (first * ROWS + i * STEP) * J + head
    ok = j_ok[:, None] & (e < D)
    tl.store(dq_ptr + at[:, None] * D + e, (dq * scale).to(dq_ptr.dtype.element_ty), mask=ok)
    tl.store(dw_ptr + at, tl.sum(dw, 0).to(dw_ptr.dtype.element_ty), mask=j_ok)
    if HAS_BIAS:
        tl.store(dbias_ptr + (first * Q + i) * J + head, tl.sum(dbias, 0), mask=j_ok)
