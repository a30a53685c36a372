"""Rows of scores of single keys, a step of keys at a time: what kernels that walk all keys share.

A program holds the queries of its rows and scores BN keys a step, as score_kernel does, in every
bit.

Legend: B batch, H selection heads, J index heads, I index width, R queries per tile, BM rows and
BN keys per step.
"""

import triton
import triton.language as tl

from gsa_kernels.index_score.triton_scores import (
    candidate_range,
    group_of,
    joined,
    product,
    ratio,
    scaled,
    unpacked,
)


@triton.jit
def rows_of(
    q_ptr, weight_ptr, bias_ptr, docs_ptr, b, h, tile, ok, T, S, q_start, J: tl.constexpr,
    H: tl.constexpr, WIDTH: tl.constexpr, BI: tl.constexpr, R: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, SIGMOID: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DOCS: tl.constexpr
):  # fmt: skip
    """(first, end) candidate of each row's tile, empty where not ok, and its `queries`."""
    JH: tl.constexpr = J // H
    first, end = candidate_range(b, tile, docs_ptr, S, ok, 1, R, WINDOW, SINKS, HAS_DOCS)
    end = tl.where(ok, end, 0)
    first = tl.where(ok, first, 1 << 30)
    q_line = (b.to(tl.int64) * T + (tile * R - q_start)) * J + h * JH
    qs, weights, biases = queries(
        q_ptr, weight_ptr, bias_ptr, q_line, ok, h, unit_of(SIGMOID), JH, WIDTH, BI, HAS_BIAS
    )
    return first, end, qs, weights, biases


@triton.constexpr_function
def unit_of(sigmoid):
    """Of the activation's argument: the exponential's, in powers of 2."""
    return -1.4426950408889634 if sigmoid else 1.0


@triton.jit
def step_scores(
    q_ptr, k_base, column_0, key_rows, qs, weights, biases, scale, JH: tl.constexpr,
    WIDTH: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr, SIGMOID: tl.constexpr,
    WIDE: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """[BM, BN] scores of keys column_0 .. of a sequence that begins at k_base."""
    n = tl.arange(0, BN)
    i = tl.arange(0, BI)
    k_mask = (column_0 + n < key_rows)[:, None] & (i < WIDTH)[None, :]
    k_at = tl.cast(column_0, tl.int64) * WIDTH + (n[:, None] * WIDTH + i[None, :])
    k = unpacked(tl.load(k_base + k_at, mask=k_mask, other=0.0), q_ptr)
    return scores_of(qs, weights, biases, k, scale * unit_of(SIGMOID), JH, SIGMOID, WIDE, HAS_BIAS)


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
