"""Launches of the Triton kernels: sizes, buffers, grids. Called by ops.py only."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from gsa_kernels.selection import Selection

from . import triton_config as config
from .inverted import invert
from .triton_backward import delta_kernel, dkv_kernel, dq_kernel
from .triton_forward import forward_kernel, mass_kernel, own_mass_kernel
from .union import unite

LOG2E = 1.4426950408889634


UNITED = 16  # queries whose own lists are united, where each query chooses alone (R = 1)


@dataclass(frozen=True)
class _Plan:
    """What the kernels walk: lists of query tiles, and their constants.

    With R = 1 the tiles hold UNITED queries, and `bits` say which of them chose a block.
    """

    lists: Tensor  # [B, Hs, tiles, N] int32
    counts: Tensor  # [B, Hs, tiles] int32
    bits: Tensor | None
    sinks: Tensor | None  # [B or 1, tiles, 2] int32
    docs: Tensor | None
    first_tile: int
    rows: int  # R G
    constants: dict[str, int]

    @property
    def tiles(self) -> int:
        return self.lists.shape[2]

    @property
    def sink_stride(self) -> int:
        """Elements from one sequence's sink ranges to the next."""
        return 0 if self.sinks is None or self.sinks.shape[0] == 1 else self.sinks.shape[1] * 2


def _plan(selection: Selection, docs: Tensor | None, heads: int, kv_heads: int, e: int) -> _Plan:
    spec, blocks = selection.spec, selection.blocks_BHQN
    united = spec.query_tile == 1
    r = UNITED if united else spec.query_tile
    first_tile = selection.q_start // r
    if united:
        unions = unite(selection, r)
        lists, counts, bits = unions.blocks_BHUN, unions.counts_BHU, unions.bits_BHUN
    else:
        lists, counts, bits = blocks, (blocks >= 0).sum(-1, dtype=torch.int32), None
    sinks = None
    if spec.sinks:
        layout = selection.layout
        sinks = torch.stack([layout.sink_lo_BQ, layout.sink_hi_BQ], -1).to(torch.int32)
        if united:  # those of a tile's first query; see _no_kernel for why they serve all
            first = torch.arange(lists.shape[2], device=blocks.device) + first_tile
            sinks = sinks[:, (first * r - selection.q_start).clamp_min(0)]
        sinks = sinks.contiguous()
    constants = dict(
        H=heads,
        K=kv_heads,
        E=e,
        BE=max(16, triton.next_power_of_2(e)),
        HS=blocks.shape[1],
        C=spec.key_block,
        R=r,
        WINDOW=spec.window,
    )
    rows = r * (heads // kv_heads)
    return _Plan(lists, counts, bits, sinks, docs, first_tile, rows, constants)


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
    gate: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out [B, T, H, E], lse [B, H, T], mass [B, Hs, Q, N] or empty, ungated out or empty); inputs
    contiguous. keep: write the ungated output too, which the backward needs."""
    batch, queries, heads, width = q.shape
    kv_heads, keys = k.shape[2], k.shape[1]
    blocks = selection.blocks_BHQN
    own = blocks.shape[3]
    plan = _plan(selection, docs, heads, kv_heads, width)
    c, slots = plan.constants["C"], plan.lists.shape[3]
    united = plan.bits is not None
    launch = config.forward(plan.rows, c, width, q.element_size(), q.device, united)
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, queries, device=q.device, dtype=torch.float32)
    sub, parts = max(1, c // launch.keys), triton.cdiv(plan.rows, launch.rows)
    mass = torch.empty(blocks.shape if need_mass else (0,), device=q.device, dtype=torch.float32)
    need_mass = need_mass and own > 0
    keep = keep and gate is not None
    ungated = torch.empty_like(q) if keep else q.new_empty(0)
    slot_lse = lse
    if need_mass:
        shape = (batch, kv_heads, plan.tiles, parts, slots * sub, launch.rows)
        slot_lse = torch.empty(
            (batch, heads, queries, own) if united else shape, device=q.device, dtype=torch.float32
        )
    tma = _tma(launch, q) and c % launch.keys == 0
    forward_kernel[(plan.tiles * parts, batch * kv_heads)](
        q, k, v, *_boxes(tma, launch.keys, k, v), out, lse, _or(gate, out), ungated,
        plan.lists, _or(plan.bits, plan.lists), plan.counts, _or(bias, lse), slot_lse,
        _or(docs, plan.lists), _or(plan.sinks, plan.lists),
        queries, keys, selection.q_start, plan.first_tile, plan.tiles, slots, own,
        plan.sink_stride, scale * LOG2E,
        **plan.constants,
        BM=launch.rows, BN=launch.keys, UNION=united,
        HAS_SINKS=plan.sinks is not None, HAS_DOCS=docs is not None, HAS_BIAS=bias is not None,
        HAS_MASS=need_mass, GATE=0 if gate is None else gate.shape[3], KEEP=keep,
        TMA=tma, STAGES=launch.stages,
        num_warps=launch.warps,
    )  # fmt: skip
    if need_mass:
        bn = min(32, triton.next_power_of_2(own))
        groups, columns = batch * blocks.shape[1], triton.cdiv(own, bn)
        if united:
            counts = (blocks >= 0).sum(-1, dtype=torch.int32)
            own_mass_kernel[(triton.cdiv(queries, 64), groups, columns)](
                slot_lse, lse, mass, counts, queries, own,
                H=heads, HS=blocks.shape[1], BT=64, BN=bn,
            )  # fmt: skip
        else:
            mass_kernel[(plan.tiles, groups, columns)](
                slot_lse, lse, mass, plan.counts, queries, selection.q_start, plan.first_tile,
                plan.tiles, slots, H=heads, K=kv_heads, HS=blocks.shape[1],
                R=plan.constants["R"], SUB=sub, BM=launch.rows, BN=bn,
            )  # fmt: skip
    return out, lse, mass, ungated


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
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dq, dk, dv, dbias, dgate) in the dtypes of q, k, v, bias and gate; inputs contiguous.

    out is the ungated output, dout the gradient of the gated one.
    """
    batch, queries, heads, width = q.shape
    kv_heads, keys = k.shape[2], k.shape[1]
    group = heads // kv_heads
    blocks, spec = selection.blocks_BHQN, selection.spec
    own, c = blocks.shape[3], spec.key_block
    plan = _plan(selection, docs, heads, kv_heads, width)
    united, slots = plan.bits is not None, plan.lists.shape[3]
    delta = torch.empty_like(lse)
    inner, dgate = dout, None
    if gate is not None:
        inner, dgate = torch.empty_like(dout), torch.empty_like(gate)
    # More rows of three tensors would not fit the registers.
    bt = 64 if gate is None else min(64, 4096 // plan.constants["BE"])
    delta_kernel[(triton.cdiv(queries, bt), batch * heads)](
        out, dout, _or(dlse, lse), _or(gate, dout), delta, inner, _or(dgate, dout), queries, heads,
        HAS_DLSE=dlse is not None, GATE=0 if gate is None else gate.shape[3],
        E=width, BE=plan.constants["BE"], BT=bt,
    )  # fmt: skip
    dout = inner
    owned = c >= 16  # key blocks large enough for a program of their own
    if not owned and deterministic:
        raise ValueError("a deterministic backward needs key blocks of 16 keys or more")
    single = owned and deterministic
    if single:
        dk, dv = torch.empty_like(k), torch.empty_like(v)
    else:
        dk, dv = (torch.zeros(k.shape, device=k.device, dtype=torch.float32) for _ in range(2))
    dq = torch.empty_like(q)
    launch = config.query_gradient(plan.rows, c, width, q.element_size(), q.device, united)
    parts = triton.cdiv(plan.rows, launch.rows)
    tma = _tma(launch, q) and c % launch.keys == 0
    dbias = lse
    if bias is not None:
        shape = (batch, heads, queries, own) if united else (
            batch, kv_heads, plan.tiles, parts, own
        )  # fmt: skip
        dbias = torch.zeros(shape, device=q.device, dtype=torch.float32)
    dq_kernel[(plan.tiles * parts, batch * kv_heads)](
        q, k, v, *_boxes(tma, launch.keys, k, v), dout, lse, delta, dq, dk, dv,
        plan.lists, _or(plan.bits, plan.lists), plan.counts, _or(bias, lse), dbias,
        _or(docs, plan.lists), _or(plan.sinks, plan.lists),
        queries, keys, selection.q_start, plan.first_tile, plan.tiles, slots, own,
        plan.sink_stride, scale, scale * LOG2E,
        **plan.constants,
        BM=launch.rows, BN=launch.keys, UNION=united,
        HAS_SINKS=plan.sinks is not None, HAS_DOCS=docs is not None, HAS_BIAS=bias is not None,
        ATOMIC=not owned, TMA=tma, STAGES=launch.stages,
        num_warps=launch.warps,
    )  # fmt: skip
    if owned:
        r = spec.query_tile
        launch = config.key_gradient(r, group, c, width, q.element_size(), q.device)
        tma = _tma(launch, q)
        tiles = blocks.shape[2]
        entries = tiles * (own + selection.sink_slots)
        longest = max(1, entries if single else config.ROWS_PER_SEGMENT // (r * group))
        lists = invert(selection, longest)
        dkv_kernel[(lists.segments_BHG4.shape[2], batch * kv_heads)](
            q, k, v, dout, *_boxes(tma, launch.rows, q, dout), lse, delta, dk, dv,
            lists.segments_BHG4, lists.tiles_BHL, lists.places_BHL, _or(bias, lse),
            _or(docs, blocks),
            queries, keys, selection.q_start, selection.q_start // r, tiles, entries, tiles * own,
            scale, scale * LOG2E,
            **(plan.constants | {"R": r}),
            BM=launch.rows, HAS_DOCS=docs is not None, HAS_BIAS=bias is not None,
            MANY=not single, TMA=tma, STAGES=launch.stages,
            num_warps=launch.warps,
        )  # fmt: skip
    if bias is None:
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, dgate
    if united:
        dbias = dbias.unflatten(1, (blocks.shape[1], -1)).sum(2)
    else:
        dbias = dbias.sum(3)
        dbias = dbias.sum(1, keepdim=True) if blocks.shape[1] == 1 else dbias
    return dq, dk.to(k.dtype), dv.to(v.dtype), dbias.to(bias.dtype), dgate


def _or(x: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel argument that is never read still has to be a tensor."""
    return stand_in if x is None else x
