"""Unions of neighbouring queries' lists, so that a tensor core has rows enough to work on.

Made by one sort on the device, with static sizes and no host synchronisation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gsa_kernels.selection import Selection


@dataclass(frozen=True)
class Unions:
    """blocks_BHUN: ascending blocks that any of a tile's queries chose, padded; bits_BHUN: bit r
    is set where query r of the tile chose the block; counts_BHU. All int32."""

    blocks_BHUN: Tensor
    bits_BHUN: Tensor
    counts_BHU: Tensor


def unite(selection: Selection, queries: int) -> Unions:
    """Unions over tiles of `queries` (at most 31) positions of a selection with R = 1."""
    blocks = selection.blocks_BHQN
    batch, heads, length, slots = blocks.shape
    before = selection.q_start % queries
    tiles = -(-(before + length) // queries)
    pad = (0, 0, before, tiles * queries - before - length)
    none = selection.layout.n_blocks  # sorts last
    flat = torch.where(blocks < 0, none, blocks)
    flat = torch.nn.functional.pad(flat, pad, value=none).view(batch, heads, tiles, -1)
    row = torch.arange(queries, device=blocks.device, dtype=torch.int32)
    tagged = flat * 32 + row.repeat_interleave(slots)
    ordered = tagged.sort(dim=-1).values
    block, bit = ordered // 32, 1 << (ordered % 32)
    new = torch.ones_like(block, dtype=torch.bool)
    new[..., 1:] = block[..., 1:] != block[..., :-1]
    place = new.cumsum(-1) - 1
    width = min(queries * slots, none)
    real = block < none
    place = place.masked_fill(~real, width)
    out = torch.zeros(batch, heads, tiles, width + 1, dtype=torch.int32, device=blocks.device)
    bits = torch.zeros_like(out).scatter_add_(-1, place, bit)
    out.scatter_(-1, place, block)
    counts = (new & real).sum(-1, dtype=torch.int32)
    return Unions(out[..., :width].contiguous(), bits[..., :width].contiguous(), counts)
