"""Launches of the Triton kernels: sizes, buffers, grids. Called by ops.py only."""

import torch
import triton
from torch import Tensor

from gsa_kernels.selection import Selection

from . import triton_config as config
from .inverted import invert
from .triton_backward import delta_kernel, dkv_kernel, dq_kernel
from .triton_forward import forward_kernel, mass_kernel

LOG2E = 1.4426950408889634


def _common(selection: Selection, heads: int, kv_heads: int, width: int) -> dict[str, int]:
    spec = selection.spec
    return dict(
        H=heads,
        K=kv_heads,
        E=width,
        BE=max(16, triton.next_power_of_2(width)),
        HS=selection.blocks_BHQN.shape[1],
        C=spec.key_block,
        R=spec.query_tile,
        WINDOW=spec.window,
    )


def _sinks(selection: Selection) -> tuple[Tensor | None, int]:
    """([B or 1, Q, 2] int32 sink ranges, elements from one sequence to the next)."""
    if not selection.spec.sinks:
        return None, 0
    layout = selection.layout
    ranges = torch.stack([layout.sink_lo_BQ, layout.sink_hi_BQ], -1).to(torch.int32)
    return ranges.contiguous(), 0 if ranges.shape[0] == 1 else ranges.shape[1] * 2


def _tma(launch: config.Launch, q: Tensor) -> bool:
    """A box is as wide as a head: widths that are padded to a power of two cannot use one."""
    width = q.shape[3]
    return launch.tma and width >= 16 and width & (width - 1) == 0


def _boxes(tma: bool, rows: int, *tensors: Tensor) -> list[object]:
    """Descriptors of [B, T, H, E] tensors as [B, T, H E] in boxes of `rows` positions of one
    head; the tensors themselves without TMA."""
    if not tma:
        return list(tensors)
    from triton.tools.tensor_descriptor import TensorDescriptor

    return [TensorDescriptor.from_tensor(x.flatten(2), [1, rows, x.shape[3]]) for x in tensors]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    bias: Tensor | None,
    docs: Tensor | None,
    scale: float,
    need_mass: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [B, T, H, E], lse [B, H, T], mass [B, Hs, Q, N] or empty); inputs contiguous."""
    batch, queries, heads, width = q.shape
    kv_heads, keys = k.shape[2], k.shape[1]
    blocks = selection.blocks_BHQN
    tiles, slots = blocks.shape[2:]
    common = _common(selection, heads, kv_heads, width)
    c, r = common["C"], common["R"]
    rows = r * (heads // kv_heads)
    launch = config.forward(rows, c, width, q.element_size(), q.device)
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, queries, device=q.device, dtype=torch.float32)
    sub, parts = max(1, c // launch.keys), triton.cdiv(rows, launch.rows)
    mass = torch.empty(blocks.shape if need_mass else (0,), device=q.device, dtype=torch.float32)
    slot_lse = lse
    if need_mass:
        shape = (batch, kv_heads, tiles, parts, slots * sub, launch.rows)
        slot_lse = torch.empty(shape, device=q.device, dtype=torch.float32)
    count = (blocks >= 0).sum(-1, dtype=torch.int32)
    sinks, sink_stride = _sinks(selection)
    first_tile = selection.q_start // r
    tma = _tma(launch, q) and c % launch.keys == 0
    forward_kernel[(tiles * parts, batch * kv_heads)](
        q, k, v, *_boxes(tma, launch.keys, k, v), out, lse, blocks, count,
        bias if bias is not None else lse, slot_lse, docs if docs is not None else blocks,
        sinks if sinks is not None else blocks,
        queries, keys, selection.q_start, first_tile, tiles, slots, sink_stride, scale * LOG2E,
        **common,
        BM=launch.rows, BN=launch.keys,
        HAS_SINKS=sinks is not None, HAS_DOCS=docs is not None, HAS_BIAS=bias is not None,
        HAS_MASS=need_mass and slots > 0, TMA=tma, STAGES=launch.stages,
        num_warps=launch.warps,
    )  # fmt: skip
    if need_mass and slots:
        bn = min(32, triton.next_power_of_2(slots))
        mass_kernel[(tiles, batch * common["HS"], triton.cdiv(slots, bn))](
            slot_lse, lse, mass, count, queries, selection.q_start, first_tile, tiles, slots,
            H=heads, K=kv_heads, HS=common["HS"], R=r, SUB=sub, BM=launch.rows, BN=bn,
        )  # fmt: skip
    return out, lse, mass


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    selection: Selection,
    bias: Tensor | None,
    docs: Tensor | None,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dbias) in the dtypes of q, k, v and bias; inputs contiguous."""
    batch, queries, heads, width = q.shape
    kv_heads, keys = k.shape[2], k.shape[1]
    blocks = selection.blocks_BHQN
    tiles, slots = blocks.shape[2:]
    common = _common(selection, heads, kv_heads, width)
    c, r = common["C"], common["R"]
    rows = r * (heads // kv_heads)
    delta = torch.empty_like(lse)
    delta_kernel[(triton.cdiv(queries, 64), batch * heads)](
        out, dout, dlse if dlse is not None else lse, delta, queries, heads,
        HAS_DLSE=dlse is not None, E=width, BE=common["BE"], BT=64,
    )  # fmt: skip
    owned = c >= 16  # key blocks large enough for a program of their own
    if not owned and deterministic:
        raise ValueError("a deterministic backward needs key blocks of 16 keys or more")
    single = owned and deterministic
    if single:
        dk, dv = torch.empty_like(k), torch.empty_like(v)
    else:
        dk, dv = (torch.zeros(k.shape, device=k.device, dtype=torch.float32) for _ in range(2))
    dq = torch.empty_like(q)
    count = (blocks >= 0).sum(-1, dtype=torch.int32)
    sinks, sink_stride = _sinks(selection)
    first_tile = selection.q_start // r
    launch = config.query_gradient(rows, c, width, q.element_size(), q.device)
    parts = triton.cdiv(rows, launch.rows)
    tma = _tma(launch, q) and c % launch.keys == 0
    dbias = lse
    if bias is not None:
        dbias = torch.zeros(
            batch, kv_heads, tiles, parts, slots, device=q.device, dtype=torch.float32
        )
    some = [bias if bias is not None else lse, dbias]
    dq_kernel[(tiles * parts, batch * kv_heads)](
        q, k, v, *_boxes(tma, launch.keys, k, v), dout, lse, delta, dq, dk, dv,
        blocks, count, *some, docs if docs is not None else blocks,
        sinks if sinks is not None else blocks,
        queries, keys, selection.q_start, first_tile, tiles, slots, sink_stride,
        scale, scale * LOG2E,
        **common,
        BM=launch.rows, BN=launch.keys,
        HAS_SINKS=sinks is not None, HAS_DOCS=docs is not None, HAS_BIAS=bias is not None,
        ATOMIC=not owned, TMA=tma, STAGES=launch.stages,
        num_warps=launch.warps,
    )  # fmt: skip
    if owned:
        launch = config.key_gradient(r, rows // r, c, width, q.element_size(), q.device)
        tma = _tma(launch, q)
        entries = tiles * (slots + selection.sink_slots)
        longest = max(1, entries if single else config.ROWS_PER_SEGMENT // rows)
        lists = invert(selection, longest)
        segments = lists.segments_BHG4.shape[2]
        dkv_kernel[(segments, batch * kv_heads)](
            q, k, v, dout, *_boxes(tma, launch.rows, q, dout), lse, delta, dk, dv,
            lists.segments_BHG4, lists.tiles_BHL, lists.places_BHL, some[0],
            docs if docs is not None else blocks,
            queries, keys, selection.q_start, first_tile, tiles, entries, tiles * slots,
            scale, scale * LOG2E,
            **common,
            BM=launch.rows, HAS_DOCS=docs is not None, HAS_BIAS=bias is not None,
            MANY=not single, TMA=tma, STAGES=launch.stages,
            num_warps=launch.warps,
        )  # fmt: skip
    if bias is not None:
        dbias = dbias.sum(3)
        dbias = dbias.sum(1, keepdim=True) if common["HS"] == 1 else dbias
        dbias = dbias.to(bias.dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype), None if bias is None else dbias
