"""Paired groups: a third design for queries that choose their own blocks (R = 1).

A union tile fetches each block for 16 queries. Here a program takes 32, two groups, and fetches
the union of both once; a group that chose nothing of a block skips it, so no more pairs are
computed than with union tiles. Window and sinks come first, from sparse_attention: the walk goes
on from their out and log-sum-exp. `query_gathering.py` times it beside the other designs.

Predicted for T = 131072, H = 16, K = 4, E = 128, C = 64, k = 2048 and smooth inputs, where union
tiles take 17.6 ms: unions of 32 are 1.27 times those of 16, so 63 % of 114 GB are read, 11 ms at
the rate measured there, beneath the same 7.3 TFLOP: 12 ms at 600 TFLOP/s. Window and sinks apart
cost 1.2 ms, unions 0.4. In all 14 ms. The gain is gone if the products, not the reads, hold back
union tiles, which now reach 413 TFLOP/s.

Legend: B batch, T queries, S keys, H query heads, K key-value heads, G = H / K, E head width,
HS selection heads, P pairs of groups, N slots of a query, U slots of a union, C keys per block.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from gsa_kernels.launch import run
from gsa_kernels.selection import Selection
from gsa_kernels.sizes import ceil_div, power_of_2
from gsa_kernels.sparse_attention import sparse_attention
from gsa_kernels.sparse_attention.triton_forward import accumulate, mask_of
from gsa_kernels.sparse_attention.triton_launch import LOG2E, boxes

PAIRED = 32  # queries of two groups: a bit each


@triton.jit
def mark_kernel(
    block_ptr,  # [B HS, T, N] int32
    map_ptr,  # [B HS, P, blocks] int32, zero: bit r is set where query r of the pair chose it
    T,
    N,
    blocks,
    q_start,
    BN: tl.constexpr,
):
    pair, line = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.arange(0, 32)[:, None]
    t = (q_start // 32 + pair) * 32 + row - q_start
    into = map_ptr + (line * tl.num_programs(0) + pair) * blocks
    for low in range(0, N, BN):
        n = low + tl.arange(0, BN)[None, :]
        ok = (t >= 0) & (t < T) & (n < N)
        block = tl.load(block_ptr + (line * T + t) * N + n, mask=ok, other=-1)
        bit = tl.full([32, BN], 1, tl.int32) << row
        tl.atomic_or(into + block, bit, mask=block >= 0, sem="relaxed")


@triton.jit
def sweep_kernel(
    map_ptr,
    list_ptr,  # [B HS, P, U] int32, ascending
    bits_ptr,  # the same: who chose it
    count_ptr,  # [B HS, P] int32
    blocks,
    U,
    BS: tl.constexpr,
):
    flat = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    count = 0
    for low in range(0, blocks, BS):
        block = low + tl.arange(0, BS)
        bits = tl.load(map_ptr + flat * blocks + block, mask=block < blocks, other=0)
        hit = (bits != 0).to(tl.int32)
        place = flat * U + count + tl.cumsum(hit, 0) - hit
        tl.store(list_ptr + place, block, mask=hit != 0)
        tl.store(bits_ptr + place, bits, mask=hit != 0)
        count += tl.sum(hit, 0)
    tl.store(count_ptr + flat, count)


@triton.jit
def half_step(
    acc, m, norm, q, k, v, bits, key, start, query, scale_log2, BM: tl.constexpr,
    C: tl.constexpr, HAS_DOCS: tl.constexpr
):  # fmt: skip
    """One block for one group; bits: of its 16 queries, in the lower half."""
    outside = (((bits >> query) & 1) - 1)[:, None]
    if HAS_DOCS:
        outside = outside | (key[None, :] - start[:, None])
    s = tl.dot(q, k, mask_of(tl.broadcast_to(outside, [BM, C])), input_precision="ieee")
    acc, m, norm, _, _ = accumulate(acc, m, norm, s, v, scale_log2, True)
    return acc, m, norm


@triton.jit(do_not_specialize=["T", "S", "q_start", "U"])
def pair_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,  # [B, S, K E] in boxes of 1 x C x E
    v_desc,
    docs_ptr,  # [B, S] int32
    list_ptr,
    bits_ptr,
    count_ptr,
    out_ptr,  # [B, T, H, E]: of window and sinks, replaced by the result
    lse_ptr,  # [B, H, T] float32, natural log: the same
    T,
    S,
    q_start,
    U,
    scale_log2,
    H: tl.constexpr,
    K: tl.constexpr,
    HS: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    STAGES: tl.constexpr,
):
    G: tl.constexpr = H // K
    BM: tl.constexpr = 16 * G
    b, kv_head = tl.program_id(1) // K, tl.program_id(1) % K
    line = b.to(tl.int64) * HS + (kv_head if HS > 1 else 0)
    line = line * tl.num_programs(0) + tl.program_id(0)
    row, e, c = tl.arange(0, BM), tl.arange(0, E), tl.arange(0, C)
    query, head = row // G, kv_head * G + row % G
    t_0 = (q_start // 32 + tl.program_id(0)) * 32 + query - q_start
    t_1 = t_0 + 16
    ok_0, ok_1 = (t_0 >= 0) & (t_0 < T), (t_1 >= 0) & (t_1 < T)
    at_0 = ((b.to(tl.int64) * T + t_0) * H + head)[:, None] * E + e
    at_1 = at_0 + 16 * H * E
    lse_at = lse_ptr + (b.to(tl.int64) * H + head) * T + t_0
    q_0 = tl.load(q_ptr + at_0, mask=ok_0[:, None], other=0.0)
    q_1 = tl.load(q_ptr + at_1, mask=ok_1[:, None], other=0.0)
    acc_0 = tl.load(out_ptr + at_0, mask=ok_0[:, None], other=0.0).to(tl.float32)
    acc_1 = tl.load(out_ptr + at_1, mask=ok_1[:, None], other=0.0).to(tl.float32)
    m_0 = tl.load(lse_at, mask=ok_0, other=0.0) * 1.4426950408889634
    m_1 = tl.load(lse_at + 16, mask=ok_1, other=0.0) * 1.4426950408889634
    norm_0, norm_1 = tl.full([BM], 1.0, tl.float32), tl.full([BM], 1.0, tl.float32)
    start_0, start_1 = query * 0, query * 0
    if HAS_DOCS:
        docs = docs_ptr + b.to(tl.int64) * S + q_start
        start_0 = tl.load(docs + t_0, mask=ok_0, other=0)
        start_1 = tl.load(docs + t_1, mask=ok_1, other=0)
    for step in tl.range(0, tl.load(count_ptr + line), num_stages=STAGES):
        block = tl.load(list_ptr + line * U + step)
        bits = tl.load(bits_ptr + line * U + step)
        k = k_desc.load([b, block * C, kv_head * E]).reshape([C, E]).T
        v = v_desc.load([b, block * C, kv_head * E]).reshape([C, E])
        key = block * C + c
        if (bits & 0xFFFF) != 0:
            acc_0, m_0, norm_0 = half_step(
                acc_0, m_0, norm_0, q_0, k, v, bits, key, start_0, query, scale_log2, BM, C,
                HAS_DOCS
            )  # fmt: skip
        if (bits >> 16) != 0:
            acc_1, m_1, norm_1 = half_step(
                acc_1, m_1, norm_1, q_1, k, v, bits >> 16, key, start_1, query, scale_log2, BM, C,
                HAS_DOCS
            )  # fmt: skip
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + at_0, (acc_0 / norm_0[:, None]).to(dtype), mask=ok_0[:, None])
    tl.store(out_ptr + at_1, (acc_1 / norm_1[:, None]).to(dtype), mask=ok_1[:, None])
    tl.store(lse_at, (m_0 + tl.log2(norm_0)) * 0.6931471805599453, mask=ok_0)
    tl.store(lse_at + 16, (m_1 + tl.log2(norm_1)) * 0.6931471805599453, mask=ok_1)


def unite(selection: Selection) -> tuple[Tensor, Tensor, Tensor]:
    """(lists [B, HS, P, U], bits, counts [B, HS, P]) of pairs of groups, int32."""
    blocks = selection.blocks_BHQN.contiguous()
    batch, heads, queries, slots = blocks.shape
    pairs = ceil_div(selection.q_start % PAIRED + queries, PAIRED)
    n_blocks = ceil_div(selection.n_keys, selection.spec.key_block)
    width = max(1, min(PAIRED * slots, n_blocks))

    def table(*shape: int) -> Tensor:
        return torch.empty(batch, heads, pairs, *shape, dtype=torch.int32, device=blocks.device)

    lists, bits, counts, marks = table(width), table(width), table(), table(n_blocks).zero_()
    grid = (pairs, batch * heads)
    run(
        mark_kernel, grid, blocks, marks, queries, slots, n_blocks, selection.q_start,
        BN=max(1, min(64, power_of_2(max(1, slots)))),
    )  # fmt: skip
    run(
        sweep_kernel, grid, marks, lists, bits, counts, n_blocks, width,
        BS=min(1024, power_of_2(n_blocks)),
    )  # fmt: skip
    return lists, bits, counts


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    scale: float | None = None,
    impl: str = "triton",
    stages: int = 2,
) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, E], lse [B, T, H] float32, natural log) as sparse_attention gives them, but
    without a gradient.

    impl: of window and sinks. Raises ValueError unless each query chooses alone (R = 1) blocks of
    16, 32, 64 or 128 keys, heads are as wide as a power of two from 16, their groups as large as
    one, and the scale is positive."""
    width, spec, group = q.shape[3], selection.spec, q.shape[2] // k.shape[2]
    scale = width**-0.5 if scale is None else scale
    if (
        spec.query_tile != 1
        or spec.key_block not in (16, 32, 64, 128)
        or width < 16
        or width & (width - 1)
        or group & (group - 1)
        or scale <= 0
    ):
        raise ValueError(
            "paired groups take R = 1, C = 16 to 128, powers of two of channels and of heads per "
            f"group and a positive scale, not {spec}, {width} channels, {group} heads, {scale}"
        )
    near = replace(selection, blocks_BHQN=selection.blocks_BHQN[..., :0])
    result = sparse_attention(q, k, v, near, scale=scale, need_lse=True, impl=impl)
    assert result.lse_BTH is not None
    out, lse = result.out_BTHE.contiguous(), result.lse_BTH.float().transpose(1, 2).contiguous()
    walk(q, k, v, selection, out, lse, scale, stages)
    return out, lse.transpose(1, 2)


def walk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    out: Tensor,
    lse: Tensor,
    scale: float,
    stages: int,
) -> None:
    """Turn out [B, T, H, E] and lse [B, H, T] of window and sinks into those of all keys."""
    (batch, queries, heads, width), kv_heads = q.shape, k.shape[2]
    spec = selection.spec
    lists, bits, counts = unite(selection)
    docs = selection.doc_start_BS
    docs = None if docs is None else docs.to(torch.int32).contiguous()
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    run(
        pair_kernel, (counts.shape[2], batch * kv_heads),
        q, k, v, *boxes(True, spec.key_block, k, v), counts if docs is None else docs,
        lists, bits, counts, out, lse, queries, k.shape[1], selection.q_start, lists.shape[3],
        scale * LOG2E, H=heads, K=kv_heads, HS=lists.shape[1], E=width, C=spec.key_block,
        HAS_DOCS=docs is not None, STAGES=stages,
        num_warps=4,
    )  # fmt: skip
