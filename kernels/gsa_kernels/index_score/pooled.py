"""Coarse scores: one for all keys of a pooling block of P keys, from their mean or maximum.

A pooling block that reaches into a tile's local window is pooled over its keys before the window
only, so that no key at or after the anchor is read. With r[s] the keys of s's block and document
pooled up to position s, a block's key is r at its last visible position, whatever the tile:
training, where blocks are long complete, and decoding, where one grows, agree.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gsa_kernels.selection import Selection, TileLayout

from .factors import IndexFactors
from .keys import take
from .scores import _CHUNK

POOLINGS = ("mean", "max")
BOUND = "bound"  # the pooling of coarse scores that no key's score can exceed


@dataclass(frozen=True)
class PooledFactors(IndexFactors):
    """IndexFactors whose scores see keys pooled `pool` at a time; block_score is not used.

    pooling: mean, or max of each channel. Raises ValueError for another one, or pool below 1.
    """

    pool: int = 64
    pooling: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pool(self.pool, self.pooling)

    def elements(self, block: int) -> int:
        return max(self.heads, -(-self.q_BTJI.shape[2] * block // self.pool))

    def prepare(self, block: int, doc_start_BS: Tensor | None) -> Tensor:
        check_pool(self.pool, self.pooling, block)
        return running_pool(self.keys_BSI, self.pool, self.pooling, doc_start_BS)

    def tile_scores(
        self, layout: TileLayout, tiles: slice, n_blocks: int, prepared: Tensor
    ) -> Tensor:
        scores = coarse_scores(self, prepared, layout, tiles, n_blocks, self.pool)
        return scores.repeat_interleave(self.pool // layout.spec.key_block, -1)[..., :n_blocks]

    def at(self, selection: Selection) -> Tensor:
        """[B, H, Q, N] scores of the pooling blocks that hold the selected blocks."""
        layout, blocks = selection.layout, selection.blocks_BHQN
        c = layout.spec.key_block
        running = self.prepare(c, selection.doc_start_BS)
        batch, groups, tiles, slots = blocks.shape
        if slots == 0 or running.shape[1] == 0:
            return self.weight_BTJ.new_zeros(batch, groups, tiles, slots)
        at_anchor = self.rows(layout.anchor_Q - self.q_start)
        per_tile = max(1, batch * groups * slots * running.shape[-1])
        step = max(1, 4 * _CHUNK[running.device.type] // per_tile)

        def piece(q: Tensor, w: Tensor, k: Tensor, lo: int, hi: int) -> Tensor:
            pooled = blocks[:, :, lo:hi].long().clamp_min(0) * c // self.pool
            last = torch.minimum((pooled + 1) * self.pool, layout.local_BQ[:, None, lo:hi, None])
            return replace(at_anchor, q_BTJI=q, weight_BTJ=w).gathered(
                take(k, (last - 1).clamp_min(0))
            )

        pieces = []
        for lo in range(0, tiles, step):
            hi = min(tiles, lo + step)
            args = (at_anchor.q_BTJI[:, lo:hi], at_anchor.weight_BTJ[:, lo:hi], running)
            pieces.append(checkpoint(piece, *args, lo, hi, use_reentrant=False))
        return torch.cat(pieces, 2).masked_fill(blocks < 0, -torch.inf)


def check_pool(
    pool: int, pooling: str, block: int = 1, poolings: tuple[str, ...] = POOLINGS
) -> None:
    """ValueError for a pooling that does not exist or does not line up with key blocks."""
    if pooling not in poolings:
        raise ValueError(f"pooling {pooling!r} is not one of {', '.join(poolings)}")
    if pool < 1 or pool % block:
        raise ValueError(f"pool={pool} is not a multiple of the key block of {block}")


def running_pool(
    k_BSI: Tensor, pool: int, pooling: str = "mean", doc_start_BS: Tensor | None = None
) -> Tensor:
    """[B, S, I]: each position's pooling block and document pooled up to that position.

    pooling "bound": [B, S, 2 I], the largest and then the smallest value of each channel.
    A scan by doubling: what a position gets depends on its block's keys alone, bit for bit.
    Recomputed in the backward.
    """
    if torch.is_grad_enabled() and k_BSI.requires_grad:
        out = checkpoint(_scan, k_BSI, pool, pooling, doc_start_BS, use_reentrant=False)
        assert isinstance(out, Tensor)
        return out
    return _scan(k_BSI, pool, pooling, doc_start_BS)


def _scan(k_BSI: Tensor, pool: int, pooling: str, doc_start_BS: Tensor | None) -> Tensor:
    keys = k_BSI.shape[1]
    position = torch.arange(keys, device=k_BSI.device)
    first = (position // pool * pool)[None]
    if doc_start_BS is not None:
        first = torch.maximum(first, doc_start_BS[:, :keys])
    # Sums of bfloat16 keys would lose digits.
    held = k_BSI if k_BSI.dtype == torch.float64 else k_BSI.float()
    if pooling == BOUND:
        held = torch.cat((held, -held), -1)
    step = 1
    while step < min(pool, keys):
        before = torch.nn.functional.pad(held, (0, 0, step, 0))[:, :keys]
        both = held + before if pooling == "mean" else torch.maximum(held, before)
        held = torch.where((position - step >= first)[..., None], both, held)
        step *= 2
    if pooling == "mean":
        held = held / (position - first + 1)[..., None]
    elif pooling == BOUND:
        held = torch.cat((held[..., : k_BSI.shape[-1]], -held[..., k_BSI.shape[-1] :]), -1)
    return held.to(k_BSI.dtype)


def both_signs(q_BTJI: Tensor) -> Tensor:
    """[B, T, J, 2 I] whose product with the pooled keys of a bound is no smaller than any key's:

        max over keys of q . k  <=  sum_i max(q_i max_i, q_i min_i)
                                 =  max(q, 0) . max + min(q, 0) . min

    as the bounds of Quest (arXiv 2406.10774).
    """
    return torch.cat((q_BTJI.clamp_min(0), q_BTJI.clamp_max(0)), -1)


def coarse_scores(
    factors: IndexFactors,
    running_BSI: Tensor,
    layout: TileLayout,
    tiles: slice,
    n_blocks: int,
    pool: int,
    pooling: str = "mean",
) -> Tensor:
    """[B, H, tiles, M] scores of the M pooling blocks that hold the first n_blocks key blocks."""
    columns = -(-n_blocks * layout.spec.key_block // pool)
    at = factors.rows(layout.anchor_Q[tiles] - factors.q_start)
    if pooling == BOUND:
        at = replace(at, q_BTJI=both_signs(at.q_BTJI))
    whole = running_BSI[:, pool - 1 :: pool][:, :columns]
    scores = torch.nn.functional.pad(at.tile(whole), (0, columns - whole.shape[1]))
    # The block that the local window cuts, one per tile.
    last = (layout.local_BQ[0, tiles] - 1).clamp_min(0)
    batch, rows, width = running_BSI.shape[0], len(last), running_BSI.shape[-1]
    edge = running_BSI[:, last][:, None, :, None].expand(batch, factors.heads, rows, 1, width)
    cut = at.gathered(edge).to(scores.dtype)
    index = (last // pool).clamp_max(columns - 1)[None, None, :, None]
    return scores.scatter(-1, index.expand_as(cut), cut)
