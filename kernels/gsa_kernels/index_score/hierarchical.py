"""Coarse to fine: pooled keys are scored first, single blocks only inside the best of them.

A tile scores S / P pooling blocks and then the blocks of its `survivors`, survivors x P keys,
instead of S keys. Its candidates, and the statistics of them, are those in the survivors.

With pooling "bound" a coarse score is a number that no score inside the pooling block exceeds, so
a tile whose last chosen score lies above every bound left out has chosen as exact scores would.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gsa_kernels.selection import TileLayout
from gsa_kernels.topk import comparable, refuse_unless, top_blocks

from .factors import IndexFactors
from .keys import own_document, take
from .pooled import BOUND, POOLINGS, check_pool, coarse_scores, pooled_keys
from .scores import _CHUNK, Scored

COARSE = (*POOLINGS, BOUND)


@dataclass(frozen=True)
class HierarchicalFactors(IndexFactors):
    """IndexFactors that score exactly inside the best pooling blocks only.

    pooling: mean, max of each channel, or bound, which refuses negative head weights when it is
    used (ValueError; a CUDA device asserts). memory: see BlockScores.remember. `tile_scores` and
    `at`, which the training losses read, stay exact for every block. Raises ValueError for an
    unknown pooling, for pool or survivors below 1, and for bounds of ReLU scores, whose weights
    have either sign, or of a scale below 0.
    """

    pool: int = 256
    survivors: int = 64
    pooling: str = "mean"
    memory: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(1)
        if self.bounded and (self.activation != "sigmoid" or self.scale < 0):
            raise ValueError(
                "pooling 'bound' needs activation 'sigmoid' and a scale of 0 or more: scores must "
                "grow with every product"
            )
        if self.survivors < 1:
            raise ValueError(f"survivors must be at least 1, got {self.survivors}")

    @property
    def bounded(self) -> bool:
        """Whether coarse scores are bounds."""
        return self.pooling == BOUND

    def check(self, block: int) -> None:
        """ValueError where pooling blocks do not hold whole key blocks."""
        check_pool(self.pool, self.pooling, block, COARSE)

    def check_weights(self) -> None:
        """Refuse negative head weights where coarse scores are bounds."""
        if self.bounded and not torch.compiler.is_compiling():
            fine = (self.weight_BTJ < 0).any().logical_not()
            refuse_unless(fine, "pooling 'bound' needs head weights that are never negative")

    def with_keys(self, k_BSI: Tensor) -> "HierarchicalFactors":
        return replace(self, k_BSI=k_BSI, memory=None)

    def remember(self, memory: Any) -> "HierarchicalFactors":
        return replace(self, memory=memory)

    def prepare(self, block: int, doc_start_BS: Tensor | None) -> Any:
        """(what is scored exactly, documents, the Pooled keys)."""
        self.check(block)
        self.check_weights()
        return (*super().prepare(block, doc_start_BS), pooled_keys(self, doc_start_BS))

    def tile_scores(
        self, layout: TileLayout, tiles: slice, n_blocks: int, prepared: Any
    ) -> Tensor:
        return super().tile_scores(layout, tiles, n_blocks, prepared[:2])

    def tiles_at_once(self, layout: TileLayout, tile: int) -> int:
        c = layout.spec.key_block
        room = _CHUNK[self.k_BSI.device.type] // (self.k_BSI.shape[0] * self.q_BTJI.shape[2])
        coarse = (layout.n_keys // self.pool) + 1
        fine = self.survivors * self.pool // (c if self._from_mean(c) else 1)
        # Gathered keys are held beside the scores.
        return max(1, room // (coarse + fine * (1 + self.k_BSI.shape[-1])))

    def scored(self, layout: TileLayout, tiles: slice, n_blocks: int, prepared: Any) -> Scored:
        keys, docs, pooled = prepared
        c = layout.spec.key_block
        ratio = self.pool // c
        coarse = coarse_scores(self, pooled, layout, tiles, n_blocks, self.pool, self.pooling)
        known = self.candidates(coarse, layout, tiles)
        local, sinks = layout.local_BQ[:, tiles, None], layout.sink_hi_BQ[:, tiles, None]
        wanted = torch.full_like(known[..., 0], self.survivors, dtype=torch.long)
        best = top_blocks(known, wanted, min(self.survivors, known.shape[-1])).long()
        inside = torch.arange(ratio, device=best.device)
        columns = (best[..., None] * ratio + inside).flatten(-2)
        allowed = (best >= 0).repeat_interleave(ratio, -1)
        allowed &= (columns * c >= sinks[:, None]) & (columns * c + c <= local[:, None])
        columns = columns.clamp(0, n_blocks - 1)
        at = self.rows(layout.anchor_Q[tiles] - self.q_start)
        if self._from_mean(c):
            scores = at.gathered(take(keys, columns))
        else:
            scores = at.gathered(take(keys, _members(columns, c))).unflatten(-1, (-1, c))
            own = own_document(c, n_blocks, docs, scores.device)
            if own is not None:
                row = torch.arange(len(own), device=own.device)[:, None, None, None]
                scores = scores.masked_fill(~own[row, columns], -torch.inf)
            scores = scores.amax(-1)
        return Scored(scores, allowed, columns, self.unseen(coarse, layout, tiles))

    def candidates(self, coarse: Tensor, layout: TileLayout, tiles: slice) -> Tensor:
        """Coarse scores [B, H, tiles, M] as they are compared, -inf where no candidate is held."""
        block = torch.arange(coarse.shape[-1], device=coarse.device) * self.pool
        local, sinks = layout.local_BQ[:, tiles, None], layout.sink_hi_BQ[:, tiles, None]
        holds = ((block < local) & (block + self.pool > sinks))[:, None]
        return comparable(coarse).masked_fill(~holds, -torch.inf)

    def unseen(
        self, coarse: Tensor, layout: TileLayout, tiles: slice
    ) -> Callable[[], Tensor] | None:
        """How to compute Scored.unseen from coarse scores; None where those bound nothing."""
        return functools.partial(self._unseen, coarse, layout, tiles) if self.bounded else None

    def _unseen(self, coarse: Tensor, layout: TileLayout, tiles: slice) -> Tensor:
        bounds = self.candidates(coarse, layout, tiles)
        if bounds.shape[-1] <= self.survivors:
            return torch.full(bounds.shape[:-1], -torch.inf, device=bounds.device)
        return bounds.topk(self.survivors + 1, -1).values[..., -1]


def _members(columns: Tensor, block: int) -> Tensor:
    """[..., M * block]: the keys of each block."""
    key = torch.arange(block, device=columns.device)
    return (columns[..., None] * block + key).flatten(-2)
