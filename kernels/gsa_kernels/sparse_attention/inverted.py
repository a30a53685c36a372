"""Inverted lists: for each key block, the query tiles that attend it outside their local window.

Made by one stable sort on the device, with static sizes and no host synchronisation. Long lists
(sinks, popular blocks) are split into segments, so that programs of a backward get like work.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gsa_kernels.selection import Selection


@dataclass(frozen=True)
class InvertedLists:
    """tiles_BHL: tile numbers (from 0), grouped by key block, ascending inside a block.

    places_BHL: for each of them its place in the flattened [Q, N] selection, -1 for a sink.
    segments_BHG4: key block (-1: unused), places [first, last) of the list, number in the block.
    Every block has a segment 0, which may be empty. All int32.
    """

    tiles_BHL: Tensor
    places_BHL: Tensor
    segments_BHG4: Tensor


def invert(selection: Selection, longest: int) -> InvertedLists:
    """Lists of a selection; a segment holds at most `longest` tiles."""
    spec, blocks = selection.spec, selection.blocks_BHQN
    batch, heads, _, width = blocks.shape
    listed, valid = selection.slots(slice(None))
    listed, valid = listed[..., : -spec.local_slots], valid[..., : -spec.local_slots]
    n_blocks, per_tile = selection.layout.n_blocks, listed.shape[-1]
    device = blocks.device
    flat = listed.masked_fill(~valid, n_blocks).to(torch.int32).flatten(2)
    ordered, order = flat.sort(dim=-1, stable=True)
    tile, slot = order // max(per_tile, 1), order % max(per_tile, 1) - selection.sink_slots
    place = torch.where(slot >= 0, tile * width + slot, -1)
    edges = torch.arange(n_blocks + 1, device=device, dtype=torch.int32)
    start = torch.searchsorted(ordered, edges.expand(batch, heads, -1).contiguous())
    count = start[..., 1:] - start[..., :-1]
    parts = (-(-count // longest)).clamp_min(1)
    end = parts.cumsum(-1)
    most = n_blocks + -(-flat.shape[-1] // longest)
    number = torch.arange(most, device=device).expand(batch, heads, -1).contiguous()
    block = torch.searchsorted(end, number, right=True)
    used = block < n_blocks
    safe = block.clamp_max(max(n_blocks - 1, 0))
    inside = number - (end - parts).gather(-1, safe)
    first = start.gather(-1, safe) + inside * longest
    last = torch.minimum(first + longest, start.gather(-1, safe + 1))
    table = torch.stack([block.masked_fill(~used, -1), first, last, inside], -1)
    return InvertedLists(tile.to(torch.int32), place.to(torch.int32), table.to(torch.int32))
