"""Chunked sparse attention in plain PyTorch: gather the key blocks of a few tiles, two matmuls.

A tile's keys fit in one chunk, so each row's softmax is complete and nothing of size T x k is
kept: the backward gathers again and recomputes. Memory is linear in T. Rows of a chunk are
(head of the group, query of the tile), M = G R of them, against all M slots of C keys at once.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gsa_kernels.selection import Selection

from .api import AttentionResult

# Logits held at once. On a CPU a chunk should stay in the cache; a GPU wants large batches.
_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 27}


def attend(
    q_BTHE: Tensor,
    k_BSKE: Tensor,
    v_BSKE: Tensor,
    selection: Selection,
    bias_BHQN: Tensor | None,
    scale: float,
    need_lse: bool,
    need_mass: bool,
) -> AttentionResult:
    # Products are float32 by design; autocast would take them back to half precision.
    with torch.autocast(q_BTHE.device.type, enabled=False):
        out, lse, mass = _SparseAttention.apply(
            q_BTHE, k_BSKE, v_BSKE, bias_BHQN, selection, scale, need_lse, need_mass
        )
    return AttentionResult(out, lse if need_lse else None, mass if need_mass else None)


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, selection, scale, need_lse, need_mass):  # type: ignore[no-untyped-def]
        work = _Workspace(q, k, v, bias, selection, scale)
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3] if need_lse else (0,), dtype=work.dtype)
        blocks = selection.blocks_BHQN
        mass = q.new_zeros(blocks.shape if need_mass else (0,), dtype=work.dtype)
        for chunk in work.chunks():
            logits = chunk.logits()
            if need_lse:
                work.store_rows(lse, chunk, logits.logsumexp(-1)[..., None])
            p = torch.softmax(logits, -1, out=work.scratch(logits.shape))
            work.store_rows(out, chunk, p @ chunk.v)
            if need_mass:
                mass[:, :, chunk.tiles] = chunk.selected_mass(p)
        ctx.save_for_backward(q, k, v, bias)
        ctx.selection, ctx.scale, ctx.has_lse = selection, scale, need_lse
        # A second call would replace the first.
        ctx.mark_non_differentiable(*((mass,) if need_lse else (mass, lse)))
        return out, lse, mass

    @staticmethod
    def backward(ctx, dout, dlse, _dmass):  # type: ignore[no-untyped-def]
        with torch.autocast(dout.device.type, enabled=False):
            return _SparseAttention.gradients(ctx, dout, dlse)

    @staticmethod
    def gradients(ctx, dout, dlse):  # type: ignore[no-untyped-def]
        q, k, v, bias = ctx.saved_tensors
        work = _Workspace(q, k, v, bias, ctx.selection, ctx.scale)
        dq = torch.empty_like(q)
        dk, dv = work.key_gradients()
        dbias = None if bias is None else torch.zeros_like(bias, dtype=work.dtype)
        for chunk in work.chunks():
            logits = chunk.logits()
            p = torch.softmax(logits, -1, out=work.scratch(logits.shape))
            do = work.load_rows(dout, chunk)
            work.scatter(dv, chunk, p.transpose(1, 2) @ do)
            dp = torch.bmm(do, chunk.v.transpose(1, 2), out=logits)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            if ctx.has_lse:  # d lse / d logits is the softmax itself
                ds.addcmul_(p, work.load_rows(dlse[..., None], chunk))
            if dbias is not None:
                dbias[:, :, chunk.tiles] = chunk.bias_gradient(ds)
            work.store_rows(dq, chunk, (ds @ chunk.k).mul_(ctx.scale))
            work.scatter(dk, chunk, (ds.transpose(1, 2) @ chunk.q))
        dk, dv = work.finish(dk, k), work.finish(dv, v)
        return dq, dk, dv, None if dbias is None else dbias.to(bias.dtype), None, None, None, None


@dataclass
class _Chunk:
    """Some tiles and their gathered keys: q [n, rows, E] (scaled), k, v [n, slots C, E]."""

    work: "_Workspace"
    tiles: slice
    index: Tensor  # rows of the block table, one per slot
    valid: Tensor  # [B, Hs, tiles, slots]
    q: Tensor
    k: Tensor
    v: Tensor

    def logits(self) -> Tensor:
        w = self.work
        n, rows, _ = self.q.shape
        logits = torch.bmm(self.q, self.k.transpose(1, 2), out=w.scratch_logits(n, rows))
        spec = w.selection.spec
        c, near = spec.key_block, spec.local_slots
        tiles = self.tiles.stop - self.tiles.start
        grid = logits.view(w.batch, w.kv_heads, tiles, w.group, w.tile_rows, -1)
        if w.bias is not None:
            low = w.selection.sink_slots * c
            slots = grid[..., low : low + w.bias.shape[-1] * c].unflatten(-1, (-1, c))
            slots.add_(w.bias[:, :, self.tiles, None, None, :, None])
        position = w.positions(self.tiles)
        if w.docs is not None:
            blocks = self.index.view(w.batch, w.kv_heads, tiles, -1) % w.n_blocks
            key = (blocks[..., None] * c + w.offset).flatten(-2)
            query = position.clamp_max(w.selection.n_keys - 1)
            start = w.docs[:, query][:, None, :, :, None]
            keep = (key[:, :, :, None] >= start) & (key[:, :, :, None] <= position[..., None])
            keep &= self.valid.repeat_interleave(c, -1)[:, :, :, None]
            grid.masked_fill_(~keep[:, :, :, None], -math.inf)
            return logits
        block = w.selection.layout.local_BQ[:, self.tiles, None] // c
        block = block + torch.arange(near, device=logits.device)
        key = (block[..., None] * c + w.offset).flatten(-2)
        late = key[0, :, None] > position[..., None]  # [tiles, R, near C]
        grid[..., -near * c :].masked_fill_(late[:, None], -math.inf)
        outer = self.valid[..., :-near]
        if not bool(outer.all()):
            drop = ~outer[:, :, :, None, None, :, None]
            grid[..., : -near * c].unflatten(-1, (-1, c)).masked_fill_(drop, -math.inf)
        return logits

    def _per_slot(self, x: Tensor) -> Tensor:
        """[n, M, slots C] summed over rows and keys of a block: [B, K, tiles, selected slots]."""
        w = self.work
        spec = w.selection.spec
        total = x.sum(1).unflatten(-1, (-1, spec.key_block)).sum(-1)
        total = total.view(w.batch, w.kv_heads, -1, total.shape[-1])
        n = w.selection.blocks_BHQN.shape[-1]
        return total[..., w.selection.sink_slots : w.selection.sink_slots + n]

    def _fold_heads(self, x: Tensor) -> Tensor:
        shared = self.work.selection.blocks_BHQN.shape[1] == 1
        return x.sum(1, keepdim=True) if shared else x

    def selected_mass(self, p: Tensor) -> Tensor:
        w = self.work
        inside = w.inside(self.tiles)  # [tiles, R]
        if not bool(inside.all()):
            rows = inside[:, None, :, None].to(p.dtype)
            grid = p.view(w.batch, w.kv_heads, -1, w.group, w.tile_rows, p.shape[-1])
            p = (grid * rows).view(p.shape)
        total = self._fold_heads(self._per_slot(p))
        heads = w.kv_heads * w.group // total.shape[1]
        picked = self.work.selection.blocks_BHQN[:, :, self.tiles] >= 0
        return total / (inside.sum(-1)[:, None] * heads) * picked

    def bias_gradient(self, ds: Tensor) -> Tensor:
        return self._fold_heads(self._per_slot(ds))


class _Workspace:
    """Layouts and buffers of one call: tile-aligned rows, block tables, chunk sizes."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        selection: Selection,
        scale: float,
    ) -> None:
        spec = selection.spec
        self.selection, self.scale, self.docs = selection, scale, selection.doc_start_BS
        self.batch, self.queries, heads, self.width = q.shape
        self.kv_heads = k.shape[2]
        self.group = heads // self.kv_heads
        # float64 stays; everything else is computed in float32.
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.q, self.bias = q, bias
        self.n_blocks = selection.layout.n_blocks
        self.k_table, self.v_table = self._table(k), self._table(v)
        # One query decodes alone: no need to compute the rest of its tile.
        self.tile_rows = 1 if self.queries == 1 else spec.query_tile
        self.offset = torch.arange(spec.key_block, device=q.device)
        slots = selection.sink_slots + selection.blocks_BHQN.shape[-1] + spec.local_slots
        self.keys_per_tile = slots * spec.key_block
        rows = self.group * self.tile_rows
        per_tile = self.batch * self.kv_heads * rows * self.keys_per_tile
        self.step = max(1, _CHUNK[q.device.type] // per_tile)
        size = min(self.step, selection.layout.n_tiles) * per_tile
        self._buffers = [torch.empty(size, dtype=self.dtype, device=q.device) for _ in range(2)]
        gathered = size // rows * self.width
        self._gathers = [torch.empty(gathered, dtype=k.dtype, device=q.device) for _ in range(2)]

    def _table(self, x_BSKE: Tensor) -> Tensor:
        """[B K blocks, C E] rows to gather, zero-padded to whole blocks."""
        c = self.selection.spec.key_block
        pad = self.n_blocks * c - x_BSKE.shape[1]
        x = x_BSKE.transpose(1, 2)
        if pad:
            x = torch.nn.functional.pad(x, (0, 0, 0, pad))
        return x.reshape(self.batch * self.kv_heads * self.n_blocks, c * self.width)

    def scratch_logits(self, n: int, rows: int) -> Tensor:
        shape = (n, rows, self.keys_per_tile)
        return self._buffers[0][: math.prod(shape)].view(shape)

    def scratch(self, shape: torch.Size) -> Tensor:
        return self._buffers[1][: shape.numel()].view(shape)

    def positions(self, tiles: slice) -> Tensor:
        """[tiles, rows] absolute position of each row."""
        if self.queries == 1:
            return torch.tensor([[self.selection.q_start]], device=self.q.device)
        anchor = self.selection.layout.anchor_Q[tiles, None]
        return anchor + torch.arange(self.tile_rows, device=self.q.device)

    def inside(self, tiles: slice) -> Tensor:
        """[tiles, rows] bool: rows that are queries of this call, not padding of a tile."""
        t = self.positions(tiles) - self.selection.q_start
        return (t >= 0) & (t < self.queries)

    def load_rows(self, x_BTHE: Tensor, chunk: "_Chunk | slice") -> Tensor:
        """[B K tiles, G R, E] rows of the chunk's tiles; zeros where a tile sticks out."""
        tiles = chunk if isinstance(chunk, slice) else chunk.tiles
        n = tiles.stop - tiles.start
        low, high, before, after = self._span(tiles)
        x = x_BTHE[:, low:high].to(self.dtype)
        if before or after:
            x = torch.nn.functional.pad(x, (0, 0, 0, 0, before, after))
        x = x.view(self.batch, n, self.tile_rows, self.kv_heads, self.group, x.shape[-1])
        x = x.permute(0, 3, 1, 4, 2, 5)
        return x.reshape(self.batch * self.kv_heads * n, -1, x.shape[-1])

    def store_rows(self, x_BTHE: Tensor, chunk: _Chunk, rows: Tensor) -> None:
        """Write [B K tiles, G R, E] rows back to their queries (E is dropped where it is 1)."""
        n = chunk.tiles.stop - chunk.tiles.start
        low, high, before, after = self._span(chunk.tiles)
        grid = rows.view(self.batch, self.kv_heads, n, self.group, self.tile_rows, -1)
        grid = grid.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)
        grid = grid[:, before : grid.shape[1] - after]
        x_BTHE[:, low:high] = grid if x_BTHE.ndim == 4 else grid.squeeze(-1)

    def _span(self, tiles: slice) -> tuple[int, int, int, int]:
        """(low, high, rows before, rows after): the chunk's queries and its padding."""
        if self.queries == 1:
            return 0, 1, 0, 0
        r = self.selection.spec.query_tile
        first = self.selection.q_start // r * r + tiles.start * r - self.selection.q_start
        last = first + (tiles.stop - tiles.start) * r
        low, high = max(0, first), min(self.queries, last)
        return low, high, low - first, last - high

    def chunks(self) -> Iterator[_Chunk]:
        n_tiles = self.selection.layout.n_tiles
        heads = torch.arange(self.batch * self.kv_heads, device=self.q.device) * self.n_blocks
        heads = heads.view(self.batch, self.kv_heads, 1, 1)
        for low in range(0, n_tiles, self.step):
            tiles = slice(low, min(n_tiles, low + self.step))
            blocks, valid = self.selection.slots(tiles)
            index = (blocks + heads).reshape(-1)
            q = self.load_rows(self.q, tiles).mul(self.scale)
            k = self._gather(self.k_table, index, 0, q.shape[0])
            v = self._gather(self.v_table, index, 1, q.shape[0])
            yield _Chunk(self, tiles, index, valid, q, k, v)

    def _gather(self, table: Tensor, index: Tensor, slot: int, n: int) -> Tensor:
        shape = (index.numel(), table.shape[1])
        out = self._gathers[slot][: math.prod(shape)].view(shape)
        torch.index_select(table, 0, index, out=out)
        return out.view(n, self.keys_per_tile, self.width).to(self.dtype)

    def key_gradients(self) -> tuple[Tensor, Tensor]:
        shape, device = self.k_table.shape, self.q.device
        dk = torch.zeros(shape, dtype=self.dtype, device=device)
        return dk, torch.zeros_like(dk)

    def scatter(self, table: Tensor, chunk: _Chunk, rows: Tensor) -> None:
        """Add the gradients of gathered keys to their blocks."""
        table.index_add_(0, chunk.index, rows.view(chunk.index.numel(), table.shape[1]))

    def finish(self, table: Tensor, like_BSKE: Tensor) -> Tensor:
        grad = table.view(self.batch, self.kv_heads, -1, self.width)
        return grad[:, :, : like_BSKE.shape[1]].transpose(1, 2).to(like_BSKE.dtype)
