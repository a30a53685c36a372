"""Controls that look at positions only: a hash of them, or an even spread. No keys, no state.

Positions count from the first block of the query's document, so that a document is treated the
same wherever it stands, and in every sample of a batch.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gsa_kernels.selection import TileLayout

from .scores import BlockScores, undefined

_MASK = (1 << 32) - 1


@dataclass(frozen=True)
class _PositionScores(BlockScores):
    """k_BSI is [B, S, 0]: it carries the batch, the number of keys and the device."""

    k_BSI: Tensor
    queries: int
    heads: int = 1
    q_start: int = 0

    @property
    def n_queries(self) -> int:
        return self.queries

    @property
    def bound(self) -> float:
        return 1.0

    def with_keys(self, k_BSI: Tensor) -> "BlockScores":
        return replace(self, k_BSI=k_BSI)

    def tile_scores(
        self, layout: TileLayout, tiles: slice, n_blocks: int, prepared: Any
    ) -> Tensor:
        c = layout.spec.key_block
        first = layout.sink_lo_BQ[:, tiles]
        anchor = (layout.anchor_Q[tiles] - first)[:, None, :, None]
        block = torch.arange(n_blocks, device=first.device) - first[..., None] // c
        head = torch.arange(self.heads, device=first.device)[:, None, None]
        scores = self.at_positions(head, anchor, block[:, None], c)
        return scores.expand(self.k_BSI.shape[0], self.heads, *scores.shape[2:])

    def at_positions(self, head: Tensor, anchor: Tensor, block: Tensor, block_keys: int) -> Tensor:
        """float32 scores in [0, 1] from broadcast positions; `block` is negative in documents
        before the query's, which are never candidates."""
        raise undefined(self, "at_positions()")


@dataclass(frozen=True)
class RandomScores(_PositionScores):
    """Uniform numbers, a hash of (seed, stream, head, query, first key of the block).

    The same in training and decoding, on every device, and for every content. stream tells apart
    users of one seed (layers).
    """

    seed: int = 0
    stream: int = 0

    def at_positions(self, head: Tensor, anchor: Tensor, block: Tensor, block_keys: int) -> Tensor:
        key = _mix(_mix(_mix(head + (self.seed & _MASK)) + self.stream) + anchor)
        bits = _mix(key + block * block_keys)
        return (bits >> 8).float() / (1 << 24)


@dataclass(frozen=True)
class StridedScores(_PositionScores):
    """Every n-th block, in an order that spreads any number of them evenly.

    stride n > 0: multiples of n come before all others. 0: none is preferred, so that a budget of
    one block in n takes about every n-th. The order is that of van der Corput (the block's number
    with its bits reversed), as static strided patterns (Child et al. 2019, arXiv 1904.10509) know
    the budget in advance and a score function does not.
    """

    stride: int = 0

    def __post_init__(self) -> None:
        if self.stride < 0:
            raise ValueError(f"stride must be 0 or more, got {self.stride}")

    def at_positions(self, head: Tensor, anchor: Tensor, block: Tensor, block_keys: int) -> Tensor:
        block = block.clamp_min(0)
        order = 1 - _reversed_bits(torch.arange(block.shape[-1], device=block.device))
        if self.stride < 2:
            return order[block]
        on = block % self.stride == 0
        return (order[torch.where(on, block // self.stride, block)] + on) / 2


def _mix(x: Tensor) -> Tensor:
    """32 well-mixed bits of each integer (the finaliser of MurmurHash3), in int64."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def _reversed_bits(x: Tensor) -> Tensor:
    """float32 in [0, 1): the 24 low bits of each integer read backwards behind the point."""
    out = torch.zeros_like(x)
    for bit in range(24):
        out |= ((x >> bit) & 1) << (23 - bit)
    return out.float() / (1 << 24)
