"""Launches of the Triton kernels: sizes, buffers, grids. Called by ops.py only."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gsa_kernels.launch import run
from gsa_kernels.selection import Selection
from gsa_kernels.sizes import ceil_div, padded, power_of_2

from . import triton_config as config
from .gather_backward import add_chosen, gathers
from .gather_launch import add_far, split_choices
from .triton_backward import delta_kernel, dkv_kernel, dq_kernel
from .triton_forward import forward_kernel, mass_kernel, own_mass_kernel
from .triton_inverted import invert
from .triton_residual import lost_bits
from .triton_tiles import tile_table
from .triton_token import invert_kernel, owned_kernel, pack_kernel, pair_sums_kernel
from .triton_union import OWNED, UNITED, Unions, parts, unite

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class _Plan:
    """What the kernels walk: lists of query tiles, and their constants.

    With R = 1 the tiles hold 16 or 32 queries, and the bits of their union say which of them chose
    a block. Where the blocks are single keys, the sinks are in the lists.
    """

    lists: Tensor  # [B, Hs, tiles, N] int32
    counts: Tensor  # [B, Hs, tiles] int32
    union: Unions | None
    sinks: Tensor | None  # [B or 1, tiles, 2] int32
    docs: Tensor | None
    first_tile: int
    rows: int  # R G
    constants: dict[str, int]

    @property
    def tiles(self) -> int:
        return self.lists.shape[2]

    @property
    def bits(self) -> Tensor | None:
        return None if self.union is None else self.union.bits_BHUN

    @property
    def sink_stride(self) -> int:
        """Elements from one sequence's sink ranges to the next."""
        return 0 if self.sinks is None or self.sinks.shape[0] == 1 else self.sinks.stride(0)


def _plans(
    selection: Selection,
    docs: Tensor | None,
    heads: int,
    kv_heads: int,
    e: int,
    pairs: int = 0,
    starts: bool = False,
    group: int = UNITED,
) -> Iterator[_Plan]:
    """One plan, or several where unions would take much memory: each for some tiles. The lists of
    one must be let go before the next is asked for.

    pairs: numbers per union that its user holds besides. starts: needs all unions at a time.
    group: queries of a union.
    """
    spec, blocks = selection.spec, selection.blocks_BHQN
    united = spec.query_tile == 1
    r = group if united else spec.query_tile
    first_tile = selection.q_start // r
    constants = dict(
        H=heads,
        K=kv_heads,
        E=e,
        BE=padded(e),
        HS=blocks.shape[1],
        C=spec.key_block,
        R=r,
        WINDOW=spec.window,
    )
    rows = r * (heads // kv_heads)
    if not united:
        counts, sinks = tile_table(selection, r, False)
        assert counts is not None
        yield _Plan(blocks, counts, None, sinks, docs, first_tile, rows, constants)
        return
    sinks = tile_table(selection, r, True)[1] if spec.key_block > 1 else None
    for first, size in parts(selection, pairs, starts, group):
        union = unite(selection, docs, starts, (first, size), group)
        part = None if sinks is None else sinks[:, first : first + size]
        lists, counts = union.lists_BHUN, union.counts_BHU
        yield _Plan(lists, counts, union, part, docs, first_tile + first, rows, constants)
        del union, lists, counts


def _tma(launch: config.Launch, q: Tensor) -> bool:
    """A box is as wide as a head: widths that are padded to a power of two cannot use one."""
    width = q.shape[3]
    return launch.tma and width >= 16 and width & (width - 1) == 0


def boxes(tma: bool, rows: int, *tensors: Tensor) -> list[object]:
    """Descriptors of [B, T, H, E] tensors as [B, T, H E] in boxes of `rows` positions of one
    head; the tensors themselves without TMA."""
    if not tma:
        return list(tensors)
    found: list[object] = []
    for x in tensors:
        batch, length, heads, width = x.shape
        row = heads * width
        strides = [length * row, row, 1]
        found.append(TensorDescriptor(x, [batch, length, row], strides, [1, rows, width]))
    return found


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out [B, T, H, E], lse [B, H, T], mass [B, Hs, Q, N] or empty, ungated out or empty, its
    residual [B, T, H, E] int8 or empty); inputs contiguous. keep: write what the backward needs,
    too: the ungated output, and what of 16-bit ones rounding has lost (triton_residual.py)."""
    if scale < 0:  # the kernel takes the largest product for the largest logit
        q, scale = -q, -scale
    batch, queries, heads, width = q.shape
    kv_heads, keys = k.shape[2], k.shape[1]
    blocks = selection.blocks_BHQN
    own = blocks.shape[3]
    c, r = selection.spec.key_block, selection.spec.query_tile
    united, single = r == 1, c == r == 1
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, queries, device=q.device, dtype=torch.float32)
    mass = torch.empty(blocks.shape if need_mass else (0,), device=q.device, dtype=torch.float32)
    need_mass = need_mass and own > 0
    slot_mass = need_mass and not single
    # The tiles attend what is near, and the gate waits for the rest.
    far = split_choices(q, k, selection, bias, need_mass)
    lost = lost_bits(q.dtype) if keep or far is not None else 0
    residual = torch.empty(q.shape if lost else (0,), device=q.device, dtype=torch.int8)
    keep = keep and gate is not None
    ungated = torch.empty_like(q) if keep else q.new_empty(0)
    slot_lse = lse
    if slot_mass and united:
        shape = (batch, heads, queries, own)
        slot_lse = torch.empty(shape, device=q.device, dtype=torch.float32)
    if need_mass and single:
        mass.zero_()  # the slots that are not used
    pairs = 0 if bias is None or not single else _pairs(selection)
    scale_log2 = max(scale, 1e-30) * LOG2E
    near, first, inner_gate = selection, out, gate
    if far is not None:
        near, first, inner_gate = far.near, ungated if keep else out, None
    for plan in _plans(near, docs, heads, kv_heads, width, pairs):
        packed = _packed(plan, selection, bias) if single else bias
        launch = config.forward(plan.rows, c, width, q.element_size(), q.device, united, need_mass)
        slots, sub = plan.lists.shape[3], max(1, c // launch.keys)
        per_tile = ceil_div(plan.rows, launch.rows)
        if slot_mass and not united:
            slot_lse = torch.empty(
                (batch, kv_heads, plan.tiles, per_tile, slots * sub, launch.rows),
                device=q.device, dtype=torch.float32,
            )  # fmt: skip
        tma = _tma(launch, q) and c % launch.keys == 0
        run(
            forward_kernel, (plan.tiles * per_tile, batch * kv_heads),
            q, k, v, *boxes(tma, launch.keys, k, v), first, lse, _or(inner_gate, out), ungated,
            residual, plan.lists, _or(plan.bits, plan.lists), plan.counts, _or(packed, lse),
            slot_lse,
            _or(docs, plan.lists), _or(plan.sinks, plan.lists),
            queries, keys, selection.q_start, plan.first_tile, plan.tiles, slots,
            _pairs(selection) if single else own,
            plan.sink_stride, scale_log2,
            **plan.constants,
            BM=launch.rows, BN=launch.keys, UNION=united,
            HAS_SINKS=plan.sinks is not None, HAS_DOCS=docs is not None,
            HAS_BIAS=bias is not None,
            HAS_MASS=slot_mass, GATE=0 if inner_gate is None else inner_gate.shape[3],
            KEEP=keep and far is None, LOST=lost,
            TMA=tma, STAGES=launch.stages, RANGE_STAGES=launch.range_stages,
            num_warps=launch.warps, maxnreg=launch.registers,
        )  # fmt: skip
        if need_mass and single:
            _pair_sums(mass, plan, selection, q, k, v, q, lse, lse, packed, scale, False)
        elif need_mass and not united:
            bn = min(32, power_of_2(own))
            run(
                mass_kernel, (plan.tiles, batch * blocks.shape[1], ceil_div(own, bn)),
                slot_lse, lse, mass, plan.counts, queries, selection.q_start, plan.first_tile,
                plan.tiles, slots, H=heads, K=kv_heads, HS=blocks.shape[1],
                R=r, SUB=sub, BM=launch.rows, BN=bn,
            )  # fmt: skip
        del plan, packed
    if far is not None:
        held = slot_lse if slot_mass else None
        low = residual if lost else None
        add_far(q, k, v, docs, far, first, lse, out, low, gate, held, scale_log2)
    if slot_mass and united:
        bn = min(32, power_of_2(own))
        run(
            own_mass_kernel,
            (ceil_div(queries, 64), batch * blocks.shape[1], ceil_div(own, bn)),
            slot_lse, lse, mass, (blocks >= 0).sum(-1, dtype=torch.int32), queries, own,
            H=heads, HS=blocks.shape[1], BT=64, BN=bn,
        )  # fmt: skip
        if far is not None:
            assert far.moved_BHTN is not None
            mass = mass.gather(3, far.moved_BHTN)
    return out, lse, mass, ungated, residual


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
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dq, dk, dv, dbias, dgate) in the dtypes of q, k, v, bias and gate; inputs contiguous.

    out and residual are the ungated output, dout the gradient of the gated one.
    """
    if scale < 0:  # masks are -inf, to be multiplied by a positive number
        dq, *others = backward(
            -q, k, v, out, lse, dout, dlse, selection, bias, docs, -scale, deterministic, gate,
            residual,
        )  # fmt: skip
        return -dq, *others  # type: ignore[return-value]
    batch, queries, heads, width = q.shape
    kv_heads, keys = k.shape[2], k.shape[1]
    blocks, spec = selection.blocks_BHQN, selection.spec
    own, c = blocks.shape[3], spec.key_block
    united, single = spec.query_tile == 1, c == spec.query_tile == 1
    # Single keys get their gradients from programs that own key blocks, or from dq's kernel.
    starts = single and (deterministic or config.OWNED_TOKENS)
    owned = c >= 16 or starts  # key blocks large enough for a program of their own
    if not owned and deterministic:
        raise ValueError("a deterministic backward needs key blocks of 16 keys or more")
    delta, be = torch.empty_like(lse), padded(width)
    inner, dgate = dout, None
    if gate is not None:
        inner, dgate = torch.empty_like(dout), torch.empty_like(gate)
    # More rows of three tensors would not fit the registers.
    bt = 64 if gate is None else min(64, 4096 // be)
    run(
        delta_kernel, (ceil_div(queries, bt), batch * heads),
        out, _or(residual, out), dout, _or(dlse, lse), _or(gate, dout), delta, inner,
        _or(dgate, dout), queries, heads,
        HAS_DLSE=dlse is not None, LOST=0 if residual is None else lost_bits(out.dtype),
        GATE=0 if gate is None else gate.shape[3], E=width, BE=be, BT=bt,
    )  # fmt: skip
    dout = inner
    whole = owned and (deterministic or single)  # one program adds up all of a block
    if whole:
        dk, dv = torch.empty_like(k), torch.empty_like(v)
    else:
        dk, dv = torch.zeros((2, *k.shape), device=k.device, dtype=torch.float32).unbind()
    dq = torch.empty_like(q)
    dbias = lse
    if bias is not None and united:
        dbias = torch.zeros(
            blocks.shape if single else (batch, heads, queries, own),
            device=q.device, dtype=torch.float32,
        )  # fmt: skip
    chosen = None  # blocks that are left to the gathering
    if bias is None and not deterministic and gathers(selection):
        chosen, selection = selection, replace(selection, blocks_BHQN=blocks[..., :0])
    pairs = 0 if bias is None or not single else _pairs(selection)
    # Numbers of pairs are those of groups of 16.
    atomic = not owned and bias is None
    together = config.united_queries(c, width, q.element_size(), q.device, atomic)
    for plan in _plans(selection, docs, heads, kv_heads, width, pairs, starts, together):
        slots = plan.lists.shape[3]
        packed = _packed(plan, selection, bias) if single else bias
        launch = config.query_gradient(
            plan.rows, c, width, q.element_size(), q.device, united, not owned
        )
        per_tile = ceil_div(plan.rows, launch.rows)
        tma = _tma(launch, q) and c % launch.keys == 0
        if bias is not None and not united:
            shape = (batch, kv_heads, plan.tiles, per_tile, own)
            dbias = torch.zeros(shape, device=q.device, dtype=torch.float32)
        run(
            dq_kernel, (plan.tiles * per_tile, batch * kv_heads),
            q, k, v, *boxes(tma, launch.keys, k, v), dout, lse, delta, dq, dk, dv,
            plan.lists, _or(plan.bits, plan.lists), plan.counts, _or(packed, lse), dbias,
            _or(docs, plan.lists), _or(plan.sinks, plan.lists),
            queries, keys, selection.q_start, plan.first_tile, plan.tiles, slots,
            _pairs(selection) if single else own,
            plan.sink_stride, scale, max(scale, 1e-30) * LOG2E,
            **plan.constants,
            BM=launch.rows, BN=launch.keys, UNION=united,
            HAS_SINKS=plan.sinks is not None, HAS_DOCS=docs is not None,
            HAS_BIAS=bias is not None,
            ATOMIC=not owned, TMA=tma, STAGES=launch.stages, RANGE_STAGES=launch.range_stages,
            num_warps=launch.warps,
        )  # fmt: skip
        if starts:
            _owned_keys(plan, selection, q, k, v, dout, lse, delta, dk, dv, packed, scale)
        if bias is not None and single:
            _pair_sums(dbias, plan, selection, q, k, v, dout, lse, delta, packed, scale, True)
        del plan, packed
    if owned and not starts:
        _block_gradients(
            selection, q, k, v, dout, lse, delta, dk, dv, bias, docs, scale, whole
        )  # fmt: skip
    if chosen is not None:
        add_chosen(q, k, v, dout, lse, delta, dq, dk, dv, chosen, docs, scale)
    # Results of an operator may not share their storage.
    dk, dv = (x.to(k.dtype, copy=not whole) for x in (dk, dv))
    if bias is None:
        return dq, dk, dv, None, dgate
    if united and not single:
        dbias = dbias.unflatten(1, (blocks.shape[1], -1)).sum(2)
    elif not united:
        dbias = dbias.sum(3)
        dbias = dbias.sum(1, keepdim=True) if blocks.shape[1] == 1 else dbias
    return dq, dk, dv, dbias.to(bias.dtype), dgate


def _block_gradients(
    selection: Selection,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    bias: Tensor | None,
    docs: Tensor | None,
    scale: float,
    whole: bool,
) -> None:
    """dk, dv by programs that each own a key block, or (not whole) a part of its queries."""
    batch, _, heads, width = q.shape
    kv_heads, keys = k.shape[2], k.shape[1]
    blocks, spec = selection.blocks_BHQN, selection.spec
    r, c, group, tiles = spec.query_tile, spec.key_block, heads // kv_heads, blocks.shape[2]
    own = blocks.shape[3]
    launch = config.key_gradient(r, group, c, width, q.element_size(), q.device)
    tma = _tma(launch, q)
    entries = tiles * (own + selection.sink_slots)
    longest = max(1, entries if whole else config.ROWS_PER_SEGMENT // (r * group))
    lists = invert(selection, longest, bias is not None)
    run(
        dkv_kernel, (lists.segments_BHG4.shape[2], batch * kv_heads),
        q, k, v, dout, *boxes(tma, launch.rows, q, dout), lse, delta, dk, dv,
        lists.segments_BHG4, lists.tiles_BHL, _or(lists.places_BHL, lists.tiles_BHL),
        _or(bias, lse),
        _or(docs, blocks),
        q.shape[1], keys, selection.q_start, selection.q_start // r, tiles, entries, tiles * own,
        scale, max(scale, 1e-30) * LOG2E,
        H=heads, K=kv_heads, E=width, BE=padded(width), HS=blocks.shape[1], C=c, R=r,
        WINDOW=spec.window,
        BM=launch.rows, HAS_DOCS=docs is not None, HAS_BIAS=bias is not None,
        MANY=not whole, TMA=tma, STAGES=launch.stages, RANGE_STAGES=launch.range_stages,
        num_warps=launch.warps,
    )  # fmt: skip


def _pairs(selection: Selection) -> int:
    """Most (query, key) pairs of a union of single keys, sinks included."""
    return UNITED * (selection.blocks_BHQN.shape[3] + selection.spec.sinks)


def _token_constants(plan: _Plan, selection: Selection) -> dict[str, int]:
    spec = selection.spec
    return dict(
        HS=plan.constants["HS"],
        WINDOW=spec.window,
        SINKS=spec.sinks,
        HAS_DOCS=plan.docs is not None,
    )


def _packed(plan: _Plan, selection: Selection, bias: Tensor | None) -> Tensor | None:
    """The bias of single keys by number of the pair: [B, Hs, groups, pairs]."""
    if bias is None:
        return None
    batch, heads, queries, own = bias.shape
    pairs = _pairs(selection)
    packed = torch.empty(
        batch, heads, plan.tiles, max(1, pairs), device=bias.device, dtype=torch.float32
    )
    run(
        pack_kernel, (plan.tiles, batch * heads),
        bias, packed, plan.bits, plan.counts, _or(plan.docs, plan.counts),
        queries, selection.n_keys, own, plan.lists.shape[3], pairs, selection.q_start,
        plan.first_tile,
        **_token_constants(plan, selection), BN=64,
    )  # fmt: skip
    return packed


def _pair_sums(
    sums: Tensor,
    plan: _Plan,
    selection: Selection,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    packed: Tensor | None,
    scale: float,
    gradient: bool,
) -> None:
    """Into sums [B, Hs, T, N] float32, zero: the mass of single keys, or their bias's gradient."""
    blocks = selection.blocks_BHQN
    batch, groups, queries, own = blocks.shape
    heads, width = plan.constants["H"], plan.constants["E"]
    shared, group = heads // groups, heads // plan.constants["K"]
    launch = config.pair_sums(shared, group, width, q.element_size(), gradient, q.device)
    for unit in range(0, shared // launch.each, launch.units):
        run(
            pair_sums_kernel, (plan.tiles, batch * groups),
            q, k, v, dout, lse, delta, sums, plan.lists, _or(plan.bits, plan.lists), plan.counts,
            _or(packed, lse), _or(plan.docs, plan.lists),
            queries, selection.n_keys, own, plan.lists.shape[3], _pairs(selection),
            selection.q_start, plan.first_tile, unit, 1.0 if gradient else groups / heads,
            max(scale, 1e-30) * LOG2E,
            H=heads, K=plan.constants["K"], E=width, BE=plan.constants["BE"],
            **_token_constants(plan, selection),
            UNITS=launch.units, EACH=launch.each, BM=16 * power_of_2(launch.each), BN=launch.keys,
            HAS_BIAS=packed is not None, GRADIENT=gradient, ADD=unit > 0, STAGES=launch.stages,
            num_warps=8,
        )  # fmt: skip


def _owned_keys(
    plan: _Plan,
    selection: Selection,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    packed: Tensor | None,
    scale: float,
) -> None:
    """dk, dv of single keys, by programs that each own OWNED of them."""
    assert plan.union is not None and plan.union.starts_BHUJ2 is not None
    starts, counts = plan.union.starts_BHUJ2, plan.counts
    batch, groups, tiles, owned = starts.shape[:4]
    entries = torch.empty(batch, groups, owned, tiles, device=q.device, dtype=torch.int32)
    used = torch.empty(batch, groups, owned, device=q.device, dtype=torch.int32)
    run(
        invert_kernel, (owned, batch * groups),
        starts, counts, entries, used, tiles, selection.n_keys, selection.q_start,
        OWNED=OWNED, BS=min(1024, max(16, power_of_2(tiles))),
    )  # fmt: skip
    c, biased = plan.constants, packed is not None
    launch = config.owned_keys(c["H"] // c["K"], OWNED, c["E"], q.element_size(), biased)
    run(
        owned_kernel, (owned, batch * c["K"]),
        q, k, v, dout, lse, delta, dk, dv, plan.lists, _or(plan.bits, plan.lists), counts,
        starts, entries, used, _or(packed, lse), _or(plan.docs, plan.lists),
        q.shape[1], k.shape[1], plan.lists.shape[3], _pairs(selection), tiles,
        selection.q_start, scale, max(scale, 1e-30) * LOG2E,
        H=c["H"], K=c["K"], E=c["E"], BE=c["BE"], HS=c["HS"], WINDOW=selection.spec.window,
        OWNED=OWNED, BM=launch.rows, HAS_DOCS=plan.docs is not None,
        HAS_BIAS=biased, STAGES=launch.stages,
        num_warps=launch.warps,
    )  # fmt: skip


def _or(x: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel argument that is never read still has to be a tensor."""
    return stand_in if x is None else x
