"""Attention over a Selection through xformers' block-sparse tensor.

xformers.sparse.BlockSparseTensor (github.com/facebookresearch/xformers) holds only the selected
cells of the T x S matrix. It is plain PyTorch, so it runs anywhere, forward and backward, and it
holds a few copies of every selected cell: for comparison, not for speed.

A cell is `block` queries by `block` keys. It is exact where block divides both C and R: then all
queries of a cell share the choice of all its keys, and only the causal edge, documents and padding
are left to mask inside it.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gsa_kernels.selection import Selection
from gsa_platform.contracts import AttentionOutput, LayerDims, Sequence

from ..configs import XformersSparseConfig
from ..dense import dense_attention
from . import xformers_ops
from .selected import SelectedAttention

SMALLEST = 16  # BlockSparseTensor's own limit
_CHUNK = {"cpu": 1 << 22, "cuda": 1 << 28}  # values of selected cells held at once
_NEVER = -1e30  # finite: the gradient of a log-sum-exp of -inf alone is NaN


def cell_size(key_block: int, query_tile: int) -> int:
    """Side of the cells for C and R. Raises ValueError where none is exact."""
    block = math.gcd(key_block, query_tile)
    if block < SMALLEST:
        raise ValueError(
            f"xformers_sparse needs square cells of at least {SMALLEST} that divide C and R, not "
            f"C={key_block} keys and R={query_tile} queries: choose attention.mode=tile with "
            "attention.key_block and attention.query_tile of 16, 32 or 64 (key_block also 128)"
        )
    return block


class XformersSparseAttention(SelectedAttention):
    """Attends a Selection; with none (a dense warm-up step) it attends every key.

    Raises ValueError for a granularity whose cells would not be exact.
    """

    def __init__(self, config: XformersSparseConfig, dims: LayerDims) -> None:
        c = config
        super().__init__(c.mode, c.key_block, c.query_tile, c.selection_heads, dims)
        self.block = cell_size(self.key_block, self.query_tile)

    def describe(self, device_type: str) -> str:
        xformers_ops.fmha()
        return (
            f"xformers_sparse: {self.granularity}; BlockSparseTensor, cells of "
            f"{self.block} x {self.block}, in float32"
        )

    @torch.compiler.disable
    def forward(
        self,
        q_BTHE: Tensor,
        k_BSKE: Tensor,
        v_BSKE: Tensor,
        selection: Any,
        seq: Sequence,
        bias: Tensor | None = None,
        need_mass: bool = False,
    ) -> AttentionOutput:
        if selection is None:
            return AttentionOutput(dense_attention(q_BTHE, k_BSKE, v_BSKE, seq))
        with torch.autocast(q_BTHE.device.type, enabled=False):  # it would undo the float32
            out, mass = block_sparse_attention(q_BTHE, k_BSKE, v_BSKE, selection, bias)
        return AttentionOutput(out, mass if need_mass else None)


def block_sparse_attention(
    q_BTHE: Tensor,
    k_BSKE: Tensor,
    v_BSKE: Tensor,
    selection: Selection,
    bias_BHQN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out_BTHE, mass_BHQN) as gsa_kernels.sparse_attention defines them.

    float64 stays; everything else is computed in float32. Raises ValueError for a granularity
    without exact cells.
    """
    cells = _Cells(selection)
    batch, _, heads, width = q_BTHE.shape
    kv_heads = k_BSKE.shape[2]
    group = heads // kv_heads
    dtype = torch.float64 if q_BTHE.dtype == torch.float64 else torch.float32
    # [G, B K, T', E] and [B K, S', E]: a group's heads share cells, so they are xformers' batch.
    q = cells.pad_queries(q_BTHE.to(dtype)).unflatten(2, (kv_heads, group))
    q = q.permute(3, 0, 2, 1, 4).flatten(1, 2) * width**-0.5
    k, v = (cells.pad_keys(x.to(dtype)).transpose(1, 2).flatten(0, 1) for x in (k_BSKE, v_BSKE))
    bias = None if bias_BHQN is None else bias_BHQN.to(dtype)
    shared = selection.blocks_BHQN.shape[1] == 1
    mass = q.new_zeros(selection.blocks_BHQN.shape)
    out = []
    parts = cells.parts(batch * kv_heads, kv_heads, group, q.device.type)
    for part in parts:
        rows = torch.arange(part.start, part.stop, device=q.device)
        at = (rows // kv_heads, rows * 0 if shared else rows % kv_heads)
        args = (q[:, part], k[part], v[part], cells, at, bias)
        if len(parts) > 1 and torch.is_grad_enabled():
            o, m = checkpoint(_attend, *args, use_reentrant=False)
        else:
            o, m = _attend(*args)
        out.append(o)
        mass.index_put_(at, m.detach(), accumulate=True)
    whole = torch.cat(out, 1).unflatten(1, (batch, kv_heads)).permute(1, 3, 2, 0, 4).flatten(2, 3)
    sharing = heads // selection.blocks_BHQN.shape[1]
    return cells.cut_queries(whole).to(q_BTHE.dtype), mass / (cells.tile_queries * sharing)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cells: "_Cells",
    at: tuple[Tensor, Tensor],
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out [G, n, T', E], mass [n, Q, N]) of n key-value heads, whose choices are cells[at].

    q [G, n, T', E], scaled; k, v [n, S', E].
    """
    xformers_ops.fmha()  # imports xformers as it has to be
    from xformers.ops import masked_matmul
    from xformers.sparse import BlockSparseTensor

    group, block = q.shape[0], cells.block
    layout = cells.layout[at]
    head, row, column = layout.nonzero(as_tuple=True)
    k, v = (x.expand(group, *x.shape).contiguous() for x in (k, v))
    hollow = q.new_empty(1).expand(group, len(head), block, block)
    scores = masked_matmul(q, k.transpose(-2, -1), BlockSparseTensor(hollow, layout)).values()
    tile = cells.tile_of(row)
    slot = cells.slot[at][head, tile, column * block // cells.key_block]
    if bias is not None and bias.shape[-1]:
        own = bias[at[0][head], at[1][head], tile, slot.clamp_min(0)] * (slot >= 0)
        scores = scores + own[:, None, None]
    scores = scores.masked_fill(~cells.inside(at[0][head], row, column), _NEVER)
    scores = scores - cells.row_maximum(scores.detach(), layout, head, row)
    p = torch.softmax(BlockSparseTensor(scores, layout), dim=-1)
    out = p @ v
    with torch.no_grad():
        given = (p.values() * cells.is_query(row)[..., None]).sum((0, 2, 3)) * (slot >= 0)
        shape = (len(at[0]), *cells.selection.blocks_BHQN.shape[2:])
        mass = q.new_zeros(shape)
        if shape[-1]:
            mass.index_put_((head, tile, slot.clamp_min(0)), given, accumulate=True)
    return out, mass


class _Cells:
    """The cells of a Selection: which there are, what each holds, and what to mask inside.

    Rows of cells begin at `origin`, a multiple of block at or before the first query.
    """

    def __init__(self, selection: Selection) -> None:
        spec = selection.spec
        self.selection = selection
        self.key_block, self.tile = spec.key_block, spec.query_tile
        self.block = cell_size(spec.key_block, spec.query_tile)
        self.origin = selection.q_start // self.block * self.block
        self.end = selection.q_start + selection.n_queries
        layout = selection.to_layout(self.block)
        # xformers multiplies square layouts only: beside a cache, empty rows are added.
        missing = layout.shape[3] - layout.shape[2]
        self.layout = torch.nn.functional.pad(layout, (0, 0, 0, missing))
        self.slot = self._slots()

    def _slots(self) -> Tensor:
        """[B, H, Q, blocks] number of the slot that holds a key block, -1 if it was not chosen."""
        blocks = self.selection.blocks_BHQN.long()
        n = self.selection.layout.n_blocks
        slot = blocks.new_full((*blocks.shape[:3], n + 1), -1)
        number = torch.arange(blocks.shape[-1], device=blocks.device).expand_as(blocks)
        slot.scatter_(-1, blocks.masked_fill(blocks < 0, n), number)
        return slot[..., :-1]

    @property
    def rows(self) -> int:
        return self.layout.shape[2]

    def tile_of(self, row: Tensor) -> Tensor:
        """The selection's tile that a row of cells belongs to."""
        return (self.origin + row * self.block) // self.tile - self.selection.q_start // self.tile

    @property
    def tile_queries(self) -> Tensor:
        """[Q, 1] queries of this call in each tile."""
        anchor = self.selection.layout.anchor_Q
        low = anchor.clamp_min(self.selection.q_start)
        return ((anchor + self.tile).clamp_max(self.end) - low)[:, None]

    def pad_queries(self, x_BTHE: Tensor) -> Tensor:
        before = self.selection.q_start - self.origin
        after = self.origin + self.rows * self.block - self.end
        return torch.nn.functional.pad(x_BTHE, (0, 0, 0, 0, before, after))

    def cut_queries(self, x_BTHE: Tensor) -> Tensor:
        before = self.selection.q_start - self.origin
        return x_BTHE[:, before : before + self.selection.n_queries]

    def pad_keys(self, x_BSKE: Tensor) -> Tensor:
        x_BSKE = x_BSKE[:, : self.selection.n_keys]
        after = self.layout.shape[3] * self.block - x_BSKE.shape[1]
        return torch.nn.functional.pad(x_BSKE, (0, 0, 0, 0, 0, after))

    def parts(self, n: int, kv_heads: int, group: int, device_type: str) -> list[slice]:
        """Key-value heads of the batch to take together."""
        most = int(self.layout.sum((2, 3)).max())
        step = max(1, _CHUNK[device_type] // max(1, group * most * self.block**2))
        return [slice(low, min(n, low + step)) for low in range(0, n, step)]

    def _queries(self, row: Tensor) -> Tensor:
        """[cells, block] positions of a cell's queries."""
        return (
            self.origin + row[:, None] * self.block + torch.arange(self.block, device=row.device)
        )

    def is_query(self, row: Tensor) -> Tensor:
        """[cells, block] bool: not padding."""
        position = self._queries(row)
        return (position >= self.selection.q_start) & (position < self.end)

    def inside(self, batch: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """[cells, block, block] bool: the pairs of each cell that are causal and in one document.

        Padded queries are given the last query's keys, so that no row is empty.
        """
        position = self._queries(row).clamp_max(self.end - 1)
        key = column[:, None] * self.block + torch.arange(self.block, device=row.device)
        keep = key[:, None] <= position[..., None]
        docs = self.selection.doc_start_BS
        if docs is not None:
            keep &= key[:, None] >= docs[batch[:, None], position][..., None]
        return keep

    def row_maximum(self, scores: Tensor, layout: Tensor, head: Tensor, row: Tensor) -> Tensor:
        """[G, cells, block, 1] each query's largest score over all its cells.

        xformers' softmax shifts every row by one maximum and clamps what is far below it.
        """
        line = head * layout.shape[1] + row
        top = scores.amax(-1)
        size = (scores.shape[0], layout.shape[0] * layout.shape[1], self.block)
        rows = scores.new_full(size, _NEVER)
        rows.scatter_reduce_(1, line[None, :, None].expand_as(top), top, "amax")
        return rows[:, line, :, None]
