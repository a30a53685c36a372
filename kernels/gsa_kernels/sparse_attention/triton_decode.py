"""Forward of a few queries against many keys (decoding): the keys split over programs.

A query tile's keys [sinks | selected | local window] are numbered without gaps. Each program takes
BN of the numbers and writes a partial output with its log-sum-exp; a second kernel merges them.
Which keys a program takes depends on its own sequence alone, and partial results are added in one
order, so a sequence's output is bit for bit the same whatever else is in the batch.

Keys are gathered one by one, so blocks may have any size. Legend: see triton_forward.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gsa_kernels.launch import run
from gsa_kernels.selection import Selection
from gsa_kernels.sizes import ceil_div, padded, power_of_2

from . import triton_config as config
from .triton_forward import first_local, load_gate, logits_of


# These change from token to token: no variant of the kernel for those that 16 divides.
@triton.jit(do_not_specialize=["S", "q_start", "first_tile", "n_tiles", "N"])
def decode_kernel(
    q_ptr,
    k_ptr,  # [B, S, K, E], sequences k_stride elements apart
    v_ptr,
    part_ptr,  # [B, T, H, splits, E] float32
    part_lse_ptr,  # [B, T, H, splits] float32, log2; -inf where a program had no key of the row
    list_ptr,  # [B, HS, Q, N] int32
    bias_ptr,  # [B, HS, Q, N] float32, natural log
    docs_ptr,  # [B, S] int32: first position of each position's document
    T,
    S,
    q_start,
    first_tile,
    n_tiles,
    N,
    k_stride,
    v_stride,
    scale_log2,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    HS: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    BL: tl.constexpr,  # slots of the list counted at once
    PARTS: tl.constexpr,  # programs that share the rows of a tile
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    G: tl.constexpr = H // K
    split, n_splits = tl.program_id(0), tl.num_programs(0)
    i, part = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    b, kv_head = tl.program_id(2) // K, tl.program_id(2) % K
    b64 = b.to(tl.int64)
    # Rows are those queries of the tile that this call has.
    low_t = tl.maximum((first_tile + i) * R - q_start, 0)
    high_t = tl.minimum((first_tile + i) * R + R - q_start, T)
    m_row = part * BM + tl.arange(0, BM)
    t = low_t + m_row // G
    position = q_start + t
    head = kv_head * G + m_row % G
    row_ok = t < high_t
    e = tl.arange(0, BE)
    e_ok = e < E
    line = (b64 * T + t) * H + head
    q_ok = row_ok[:, None] & e_ok
    q = tl.load(q_ptr + line[:, None] * E + e, mask=q_ok, other=0.0)
    start = position * 0
    if HAS_DOCS:
        start = tl.load(docs_ptr + b64 * S + position, mask=row_ok, other=0)

    anchor = (first_tile + i) * R
    local = first_local(anchor, C, R, WINDOW)
    sink_low, n_sinks = anchor * 0, anchor * 0
    if SINKS > 0:
        document = anchor * 0
        if HAS_DOCS:
            document = tl.load(docs_ptr + b64 * S + anchor)
        sink_low = document // C * C
        sink_high = (document + SINKS + C - 1) // C * C
        n_sinks = tl.maximum(tl.minimum(sink_high, local) - sink_low, 0)
    hs = kv_head if HS > 1 else 0
    list_base = ((b64 * HS + hs) * n_tiles + i) * N
    n_listed = anchor * 0
    for low in range(0, N, BL):
        slot = low + tl.arange(0, BL)
        chosen = tl.load(list_ptr + list_base + slot, mask=slot < N, other=-1)
        n_listed += tl.sum((chosen >= 0).to(tl.int32)) * C
    total = n_sinks + n_listed + (q_start + high_t - local)

    number = split * BN + tl.arange(0, BN)
    key_ok = number < total
    n = number - n_sinks  # from the first selected key on
    listed = (n >= 0) & (n < n_listed)
    block = tl.load(list_ptr + list_base + n // C, mask=listed, other=0)
    other = tl.where(n < 0, sink_low + number, local + n - n_listed)
    key = tl.where(listed, block * C + n % C, other)
    offset = key.to(tl.int64)[:, None] * (K * E) + e
    kv_ok = key_ok[:, None] & e_ok
    k = tl.load(k_ptr + b64 * k_stride + kv_head * E + offset, mask=kv_ok, other=0.0)
    v = tl.load(v_ptr + b64 * v_stride + kv_head * E + offset, mask=kv_ok, other=0.0)
    s = logits_of(q, tl.trans(k), scale_log2)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + list_base + n // C, mask=listed, other=0.0)
        s += bias[None, :] * 1.4426950408889634
    keep = key_ok[None, :] & (key[None, :] <= position[:, None])
    if HAS_DOCS:
        keep = keep & (key[None, :] >= start[:, None])
    s = tl.where(keep, s, float("-inf"))
    top = tl.max(s, 1)
    p = tl.exp2(s - tl.where(top == float("-inf"), 0.0, top)[:, None])
    norm = tl.sum(p, 1)
    norm = tl.where(norm > 0, norm, 1.0)  # a row may have no key here
    out = tl.dot(p.to(v.dtype), v, input_precision="ieee") / norm[:, None]
    at = line * n_splits + split
    tl.store(part_ptr + at[:, None] * E + e, out, mask=q_ok)
    tl.store(part_lse_ptr + at, top + tl.log2(norm), mask=row_ok)


@triton.jit(do_not_specialize=["n_splits"])
def merge_kernel(
    part_ptr,
    part_lse_ptr,
    out_ptr,  # [B, T, H, E]
    lse_ptr,  # [B, H, T] float32, natural log
    gate_ptr,  # [B, T, H, GATE]
    T,
    n_splits,
    H: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    BS: tl.constexpr,
    GATE: tl.constexpr,
):
    """out = sum over the splits of their outputs, weighted by 2^lse."""
    line = tl.program_id(0).to(tl.int64)  # of [B, T, H]
    e = tl.arange(0, BE)
    e_ok = e < E
    acc = tl.zeros([BE], tl.float32)
    top = tl.full([1], float("-inf"), tl.float32)
    norm = tl.zeros([1], tl.float32)
    for low in range(0, n_splits, BS):
        split = low + tl.arange(0, BS)
        ok = split < n_splits
        at = line * n_splits + split
        lse = tl.load(part_lse_ptr + at, mask=ok, other=float("-inf"))
        part = tl.load(part_ptr + at[:, None] * E + e, mask=ok[:, None] & e_ok, other=0.0)
        new = tl.maximum(top, tl.max(lse, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        alpha = tl.exp2(top - safe)
        weight = tl.exp2(lse - safe)
        norm = norm * alpha + tl.sum(weight, 0)
        acc = acc * alpha + tl.sum(part * weight[:, None], 0)
        top = new
    one = tl.zeros([1], tl.int32)
    out = (acc / norm).to(out_ptr.dtype.element_ty)
    if GATE > 0:
        gate = load_gate(gate_ptr, line, one, one == 0, GATE, BE)
        out = (out.to(tl.float32)[None, :] * gate).to(out_ptr.dtype.element_ty)
        out = tl.reshape(out, [BE])
    tl.store(out_ptr + line * E + e, out, mask=e_ok)
    h, t, b = line % H, line // H % T, line // (T * H)
    tl.store(lse_ptr + (b * H + h) * T + t + one, (top + tl.log2(norm)) * 0.6931471805599453)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    bias: Tensor | None,
    docs: Tensor | None,
    gate: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, E], lse [B, H, T]), without a backward. Inputs are contiguous, but k and v
    may be views of longer buffers: only a sequence's own rows must follow one another."""
    batch, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    k, v = (
        x if x.stride()[1:] == (kv_heads * width, width, 1) else x.contiguous() for x in (k, v)
    )
    spec, blocks = selection.spec, selection.blocks_BHQN
    c, r = spec.key_block, spec.query_tile
    first_tile, tiles, n = selection.q_start // r, blocks.shape[2], blocks.shape[3]
    rows = min(queries, r) * (heads // kv_heads)
    launch = config.decode(rows, width, q.element_size())
    window = max(
        min((first_tile + i + 1) * r, selection.q_start + queries)
        - max((first_tile + i) * r - spec.window + 1, 0) // c * c
        for i in range(tiles)
    )
    splits = ceil_div(selection.sink_slots * c + n * c + window, launch.keys)
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, queries, device=q.device, dtype=torch.float32)
    part = torch.empty(*q.shape[:3], splits, width, device=q.device, dtype=torch.float32)
    part_lse = torch.empty(*q.shape[:3], splits, device=q.device, dtype=torch.float32)
    parts, be = ceil_div(rows, launch.rows), padded(width)
    run(
        decode_kernel, (splits, tiles * parts, batch * kv_heads),
        q, k, v, part, part_lse, blocks, lse if bias is None else bias,
        blocks if docs is None else docs,
        queries, keys, selection.q_start, first_tile, tiles, n, k.stride(0), v.stride(0),
        scale * 1.4426950408889634,
        H=heads, K=kv_heads, E=width, BE=be, HS=blocks.shape[1], C=c, R=r, WINDOW=spec.window,
        SINKS=spec.sinks, BL=min(1024, power_of_2(max(n, 1))), PARTS=parts,
        BM=launch.rows, BN=launch.keys,
        HAS_DOCS=docs is not None, HAS_BIAS=bias is not None,
        num_warps=launch.warps,
    )  # fmt: skip
    run(
        merge_kernel, (batch * queries * heads,),
        part, part_lse, out, lse, out if gate is None else gate, queries, splits,
        H=heads, E=width, BE=be, BS=16, GATE=0 if gate is None else gate.shape[3],
    )  # fmt: skip
    return out, lse
