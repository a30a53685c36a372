"""Coarse scores: one for all keys of a pooling block of P keys, from their mean or maximum.

A pooling block that reaches into a tile's local window is pooled over its keys before the window
only, so that no key at or after the anchor is read. With r[s] the keys of s's block and document
pooled up to position s, a block's key is r at its last visible position, whatever the tile:
training, where blocks are long complete, and decoding, where one grows, agree. Decoding keeps the
keys of whole blocks beside its index keys (`pooled_keys`): a step pools the keys of one block.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gsa_kernels.selection import Selection, TileLayout

from .factors import IndexFactors
from .keys import take
from .scores import _CHUNK

if TYPE_CHECKING:
    from .hierarchical import HierarchicalFactors

POOLINGS = ("mean", "max")
BOUND = "bound"  # the pooling of coarse scores that no key's score can exceed


@dataclass(frozen=True)
class PooledFactors(IndexFactors):
    """IndexFactors whose scores see keys pooled `pool` at a time; block_score is not used.

    pooling: mean, or max of each channel. memory: see BlockScores.remember. Raises ValueError for
    another pooling, or pool below 1.
    """

    pool: int = 64
    pooling: str = "mean"
    memory: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pool(self.pool, self.pooling)

    def elements(self, block: int) -> int:
        return max(self.heads, -(-self.q_BTJI.shape[2] * block // self.pool))

    def with_keys(self, k_BSI: Tensor) -> "PooledFactors":
        return replace(self, k_BSI=k_BSI, memory=None)

    def remember(self, memory: Any) -> "PooledFactors":
        return replace(self, memory=memory)

    def prepare(self, block: int, doc_start_BS: Tensor | None) -> "Pooled":
        check_pool(self.pool, self.pooling, block)
        return pooled_keys(self, doc_start_BS)

    def tile_scores(
        self, layout: TileLayout, tiles: slice, n_blocks: int, prepared: "Pooled"
    ) -> Tensor:
        scores = coarse_scores(self, prepared, layout, tiles, n_blocks, self.pool)
        return scores.repeat_interleave(self.pool // layout.spec.key_block, -1)[..., :n_blocks]

    def at(self, selection: Selection) -> Tensor:
        """[B, H, Q, N] scores of the pooling blocks that hold the selected blocks."""
        layout, blocks = selection.layout, selection.blocks_BHQN
        c = layout.spec.key_block
        check_pool(self.pool, self.pooling, c)
        running = running_pool(self.keys_BSI, self.pool, self.pooling, selection.doc_start_BS)
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


@dataclass(frozen=True)
class Pooled:
    """The keys of M pooling blocks.

    whole_BMI: of the whole ones. running_BSI: `running_pool` of all positions; None: what is
    needed of it is made of the factors' keys, with documents doc_start_BS.
    """

    whole_BMI: Tensor
    running_BSI: Tensor | None
    factors: "PooledFactors | HierarchicalFactors"
    doc_start_BS: Tensor | None

    def at(self, position_Q: Tensor) -> Tensor:
        """[B, Q, I]: `running_pool` at some positions, bit for bit."""
        if self.running_BSI is not None:
            return self.running_BSI[:, position_Q]
        k, docs = self.factors.k_BSI, self.doc_start_BS
        pool, pooling = self.factors.pool, self.factors.pooling
        low = position_Q // pool * pool
        member = low[:, None] + torch.arange(pool, device=low.device)
        member = member.clamp_max(k.shape[1] - 1)
        blocks = self.factors.with_keys(k[:, member].flatten(0, 1)).keys_BSI
        if docs is not None:
            docs = (docs[:, member] - low[:, None]).expand(len(k), -1, -1).flatten(0, 1)
        running = running_pool(blocks, pool, pooling, docs).unflatten(0, (len(k), -1))
        return running[:, torch.arange(len(low), device=low.device), position_Q - low]


# (keys [B, S, I], documents) -> running_pool of them
Running = Callable[[Tensor, Tensor | None], Tensor]


def pooled_keys(
    factors: "PooledFactors | HierarchicalFactors",
    doc_start_BS: Tensor | None,
    running: Running | None = None,
) -> Pooled:
    """The pooled keys of factors. Where these have a memory, only blocks that it does not hold yet
    are pooled, and are added to it. running: another implementation than `running_pool`."""

    def eager(k_BSI: Tensor, docs: Tensor | None) -> Tensor:
        return running_pool(factors.with_keys(k_BSI).keys_BSI, pool, factors.pooling, docs)

    running = eager if running is None else running
    k, pool, memory = factors.k_BSI, factors.pool, factors.memory
    kept = None if memory is None else memory.index_pooled_BMI
    if kept is None:
        every = running(k, doc_start_BS)
        whole = every[:, pool - 1 :: pool]
        if memory is not None and whole.shape[1]:
            memory.extend("index_pooled_BMI", whole.detach().clone())  # lets go of the rest
        return Pooled(whole, every, factors, doc_start_BS)
    low, high = kept.shape[1] * pool, k.shape[1] // pool * pool
    if high > low:
        docs = None if doc_start_BS is None else doc_start_BS[:, low:high] - low
        new = running(k[:, low:high].detach(), docs)[:, pool - 1 :: pool]
        kept = memory.extend("index_pooled_BMI", new)
    return Pooled(kept, None, factors, doc_start_BS)


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
    pooled: Pooled,
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
    whole = pooled.whole_BMI[:, :columns]
    scores = torch.nn.functional.pad(at.tile(whole), (0, columns - whole.shape[1]))
    # The block that the local window cuts, one per tile.
    last = (layout.local_BQ[0, tiles] - 1).clamp_min(0)
    ends = pooled.at(last)[:, None, :, None]
    edge = ends.expand(-1, factors.heads, -1, -1, -1)
    cut = at.gathered(edge).to(scores.dtype)
    index = (last // pool).clamp_max(columns - 1)[None, None, :, None]
    return scores.scatter(-1, index.expand_as(cut), cut)
