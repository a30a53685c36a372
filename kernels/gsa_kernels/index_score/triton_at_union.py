"""Gradient of listed scores where each query lists single keys of its own (C = R = 1).

Neighbouring queries list many of the same keys. A program takes the 16 queries of a group and
walks the union of their lists, so the gradient of a key is added to memory once per group, not
once per query. What bounds this kernel is that addition.

Legend: see triton_at.py; U slots of a union; row m = head m // 16 of query m % 16.
"""

import triton
import triton.language as tl

from gsa_kernels.sparse_attention.triton_union import ones

from .triton_scores import ASSEMBLY, reciprocal


@triton.jit
def products(x, y, z, xy):
    """(xy + x y, x^T z) of about float32's precision: x float32, y and z of 16 bits.

    x is multiplied in two parts, of bfloat16, which has its range, or TF32, which holds float16.
    """
    BRAIN: tl.constexpr = y.dtype == tl.bfloat16
    PART: tl.constexpr = tl.bfloat16 if BRAIN else tl.float32
    y, z = y.to(PART), tl.trans(z.to(PART))
    # Cut off, not rounded: a conversion to and fro takes several slow instructions.
    cut = (x.to(tl.int32, bitcast=True) & (-65536 if BRAIN else -8192)).to(
        tl.float32, bitcast=True
    )
    high, low = cut.to(PART), (x - cut).to(PART)
    xy = tl.dot(low, y, tl.dot(high, y, xy, input_precision="tf32"), input_precision="tf32")
    none = tl.zeros([z.shape[0], x.shape[1]], tl.float32)
    zx = tl.dot(z, low, tl.dot(z, high, none, input_precision="tf32"), input_precision="tf32")
    return xy, tl.trans(zx)


@triton.jit
def power(x):
    """2^x; 0 below 2^-126."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@triton.jit
def set_bits(x):
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "popc.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )
    return ones(x) + ones(x >> 16)


@triton.jit
def union_gradient_kernel(
    q_ptr,  # [B, T, J, D]
    k_ptr,  # [B, M, D]
    w_ptr,  # [B, T, J]
    bias_ptr,  # [J]
    dscore_ptr,  # [B, HS, T, N] float32
    dq_ptr,  # [B, T, J, D]
    dk_ptr,  # [B, M, D] float32, zero
    dw_ptr,  # [B, T, J]
    dbias_ptr,  # [B, T, J] float32
    list_ptr,  # [B, HS, groups, U] int32
    bits_ptr,
    count_ptr,  # [B, HS, groups] int32
    T,
    M,
    N,
    U,
    shift,  # row t of group 0's first query
    scale,
    J: tl.constexpr,
    D: tl.constexpr,
    HS: tl.constexpr,
    BI: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SIGMOID: tl.constexpr,
    STAGES: tl.constexpr,
):
    JH: tl.constexpr = J // HS
    group, line = tl.program_id(0), tl.program_id(1)
    b, hs = line // HS, line % HS
    flat = line.to(tl.int64) * tl.num_programs(0) + group
    e, m = tl.arange(0, BI), tl.arange(0, 16 * JH)
    t = shift + group * 16 + m % 16
    ok = (t >= 0) & (t < T)
    head = hs * JH + m // 16
    at = (b.to(tl.int64) * T + t) * J + head
    row_ok = ok[:, None] & (e < D)
    q = tl.load(q_ptr + at[:, None] * D + e, mask=row_ok, other=0.0)
    weight = tl.load(w_ptr + at, mask=ok, other=0.0).to(tl.float32)
    bias = tl.zeros([16 * JH], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + head).to(tl.float32)
    # Of sigmoids the powers of 2 are taken.
    slope_of_s = scale
    if SIGMOID:
        slope_of_s *= -1.4426950408889634
        bias *= -1.4426950408889634
    query = tl.arange(0, 16)
    own_t = shift + group * 16 + query
    own_ok = (own_t >= 0) & (own_t < T)
    dscore_base = (line.to(tl.int64) * T + own_t) * N
    own = tl.zeros([16], tl.int32)  # places of a query's list that lie behind
    lane = tl.arange(0, 32)
    dq = tl.zeros([16 * JH, BI], tl.float32)
    dw = tl.zeros([16 * JH], tl.float32)
    dlogit = tl.zeros([16 * JH], tl.float32)
    k_base, dk_base = k_ptr + b.to(tl.int64) * M * D, dk_ptr + b.to(tl.int64) * M * D
    count = tl.load(count_ptr + flat)
    for first in tl.range(0, count, 32, num_stages=STAGES):
        n = first + lane
        key = tl.load(list_ptr + flat * U + n, mask=n < count, other=0)
        bits = tl.load(bits_ptr + flat * U + n, mask=n < count, other=0)
        at_key = key[:, None] * D + e
        k_ok = (n < count)[:, None] & (e < D)
        k = tl.load(k_base + at_key, mask=k_ok, other=0.0)
        chosen = (bits[None, :] >> query[:, None]) & 1
        # One reduction, not a scan and a sum.
        word = tl.sum(chosen << lane[None, :], 1)
        place = own[:, None] + set_bits(word[:, None] & ((1 << lane) - 1)[None, :])
        own += set_bits(word)
        there = (chosen == 1) & own_ok[:, None]
        d = tl.load(dscore_ptr + dscore_base[:, None] + place, mask=there, other=0.0)
        d = tl.reshape(tl.broadcast_to(d[None], [JH, 16, 32]), [16 * JH, 32])
        s = tl.dot(q, tl.trans(k)) * slope_of_s + bias[:, None]
        if SIGMOID:
            act = reciprocal(1.0 + power(s))
            slope = act - act * act
        else:
            # Of a NaN the maximum would be 0.
            act = tl.where(s < 0, 0.0, s)
            slope = tl.where(s > 0, 1.0, 0.0)
        dw += tl.sum(act * d, 1)
        ds = slope * d
        if HAS_BIAS:
            dlogit += tl.sum(ds, 1)
        ds *= (weight * scale)[:, None]
        dq, dk = products(ds, k, q, dq)
        tl.atomic_add(dk_base + at_key, dk, mask=k_ok, sem="relaxed")
    tl.store(dq_ptr + at[:, None] * D + e, dq.to(dq_ptr.dtype.element_ty), mask=row_ok)
    tl.store(dw_ptr + at, dw.to(dw_ptr.dtype.element_ty), mask=ok)
    if HAS_BIAS:
        tl.store(dbias_ptr + at, dlogit * weight, mask=ok)
