"""A choice of small key blocks per query (R = 1, 1 < C < 16) as one of single keys.

Gathered one by one, their keys need no kernel of their own. A query's list becomes

    [its sinks | the keys of its blocks | keys between its first local block and its window]

since sinks and local window are made of whole blocks: so the choice of single keys has no sinks of
its own. It holds 4 bytes per key, T times the budget: 1 GB at 131072 queries of 2048 keys, C times
what the blocks take; a bias or mass of the keys takes as much.

Legend: B batch, H selection heads, T queries, N blocks and M keys of a query's list, C keys per
block.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gsa_kernels.selection import Selection, tile_layout

_AT_ONCE = 1 << 24  # keys of lists: indices take 8 bytes


@dataclass(frozen=True)
class SingleKeys:
    """selection: of the keys. shift_BHT: place in a query's list of the first key of its first
    block; before_BHT: how many keys of that block lie before the query's document and are not in
    the list; ends_BHT: keys of its blocks, those included."""

    selection: Selection
    blocks: int  # N
    block: int  # C
    shift_BHT: Tensor
    before_BHT: Tensor
    ends_BHT: Tensor

    def spread(self, bias_BHTN: Tensor) -> Tensor:
        """[B, H, T, M]: the bias of each key, its block's; 0 for the others."""
        found = _Spread.apply(bias_BHTN, self)
        assert isinstance(found, Tensor)
        return found

    def summed(self, keys_BHTM: Tensor) -> Tensor:
        """[B, H, T, N]: sums over the keys of each block. Nothing atomic."""

        def part(x: Tensor, shift: Tensor, before: Tensor, ends: Tensor) -> Tensor:
            n = torch.arange(self.blocks * self.block, device=x.device)
            there = (n >= before[..., None]) & (n < ends[..., None])
            place = (n + shift[..., None]).clamp(0, x.shape[-1] - 1)
            return x.gather(-1, place).where(there, 0).unflatten(-1, (-1, self.block)).sum(-1)

        if not self.blocks:
            return keys_BHTM[..., :0]
        tensors = (keys_BHTM, self.shift_BHT, self.before_BHT, self.ends_BHT)
        return _by_rows(part, keys_BHTM.shape[-1], *tensors)

    def _spread(self, bias_BHTN: Tensor) -> Tensor:
        width = self.selection.blocks_BHQN.shape[-1]

        def part(x: Tensor, shift: Tensor, before: Tensor, ends: Tensor) -> Tensor:
            n = torch.arange(width, device=x.device) - shift[..., None]
            there = (n >= before[..., None]) & (n < ends[..., None])
            return x.gather(-1, (n // self.block).clamp(0, self.blocks - 1)).where(there, 0)

        if not self.blocks:
            return bias_BHTN.new_zeros(*bias_BHTN.shape[:3], width)
        tensors = (bias_BHTN, self.shift_BHT, self.before_BHT, self.ends_BHT)
        return _by_rows(part, width, *tensors)


class _Spread(torch.autograd.Function):
    """A gather's own backward would add atomically."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, keys: SingleKeys) -> Tensor:
        ctx.keys = keys
        return keys._spread(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.keys.summed(grad), None


def single_keys(selection: Selection) -> SingleKeys:
    """The same keys, chosen one by one; of a selection with R = 1."""
    spec, blocks, docs = selection.spec, selection.blocks_BHQN, selection.doc_start_BS
    assert spec.query_tile == 1
    c, own = spec.key_block, blocks.shape[-1]
    # Not selection.layout, which torch.compile cannot follow.
    sizes = (selection.n_queries, selection.n_keys, selection.q_start)
    layout = tile_layout(spec, *sizes, docs, blocks.device)
    window = (layout.anchor_Q - spec.window + 1).clamp_min(0)
    start_BT = torch.zeros_like(layout.local_BQ)
    if docs is not None:
        start_BT = docs[:, layout.anchor_Q].to(layout.local_BQ.dtype)
    sinks_BT = (torch.minimum(layout.sink_hi_BQ, layout.local_BQ) - start_BT).clamp_min(0)
    edge_BT = torch.maximum(layout.local_BQ, start_BT)
    edges_BT = (window - edge_BT).clamp_min(0)
    ends = (blocks >= 0).sum(-1) * c
    before = torch.zeros_like(ends)
    if docs is not None and own:
        first = blocks[..., 0] * c
        before = (start_BT[:, None] - first).clamp(0, c).where(ends > 0, 0)
    most = spec.sink_keys if docs is None or not spec.sinks else spec.sinks + c - 1
    width = most + own * c + c - 1

    def part(
        blocks: Tensor, before: Tensor, ends: Tensor, start: Tensor, sinks: Tensor,
        edge: Tensor, edges: Tensor,
    ) -> Tensor:  # fmt: skip
        place = torch.arange(width, device=blocks.device)
        n = place - (sinks - before)[..., None]  # among the keys of the blocks
        block = F.pad(blocks, (0, 1)).gather(-1, (n // c).clamp(0, own))
        keys = block * c + n % c
        late = n - ends[..., None]
        keys = torch.where(late < 0, keys, edge[..., None] + late)
        keys = torch.where(place < sinks[..., None], start[..., None] + place, keys)
        return keys.where(late < edges[..., None], -1).to(torch.int32)

    shape = blocks.shape[:3]
    rows = (x[:, None].expand(shape) for x in (start_BT, sinks_BT, edge_BT, edges_BT))
    start, sinks, edge, edges = rows
    keys = _by_rows(part, width, blocks, before, ends, start, sinks, edge, edges)
    one = replace(spec, key_block=1, sinks=0)
    selection = replace(selection, spec=one, blocks_BHQN=keys)
    return SingleKeys(selection, own, c, sinks - before, before, ends)


def _by_rows(part: Callable[..., Tensor], width: int, *tensors: Tensor) -> Tensor:
    """part(*tensors), some queries (dimension 2) at a time; width: of its largest rows."""
    batch, heads, queries = tensors[0].shape[:3]
    rows = max(1, _AT_ONCE // max(1, batch * heads * width))
    if rows >= queries:
        return part(*tensors)
    split = (x.split(rows, 2) for x in tensors)
    return torch.cat([part(*pieces) for pieces in zip(*split)], 2)
