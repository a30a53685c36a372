"""Coarse to fine: pooled keys are scored first, single blocks only inside the best of them.

A tile scores S / P pooling blocks and then the blocks of its `survivors`, survivors x P keys,
instead of S keys. Its candidates, and the statistics of them, are those in the survivors.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gsa_kernels.selection import TileLayout
from gsa_kernels.topk import comparable, top_blocks

from .factors import IndexFactors
from .keys import own_document, take
from .pooled import check_pool, coarse_scores, running_pool
from .scores import _CHUNK, Scored


@dataclass(frozen=True)
class HierarchicalFactors(IndexFactors):
    """IndexFactors that score exactly inside the best pooling blocks only.

    `tile_scores` and `at`, which the training losses read, stay exact for every block.
    Raises ValueError for an unknown pooling, and for pool or survivors below 1.
    """

    pool: int = 256
    survivors: int = 64
    pooling: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pool(self.pool, self.pooling)
        if self.survivors < 1:
            raise ValueError(f"survivors must be at least 1, got {self.survivors}")

    def check(self, block: int) -> None:
        """ValueError where pooling blocks do not hold whole key blocks."""
        check_pool(self.pool, self.pooling, block)

    def prepare(self, block: int, doc_start_BS: Tensor | None) -> Any:
        """(what is scored exactly, documents, keys pooled up to each position)."""
        self.check(block)
        running = running_pool(self.k_BSI, self.pool, self.pooling, doc_start_BS)
        return (*super().prepare(block, doc_start_BS), running)

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
        keys, docs, running = prepared
        c = layout.spec.key_block
        ratio = self.pool // c
        coarse = coarse_scores(self, running, layout, tiles, n_blocks, self.pool)
        block = torch.arange(coarse.shape[-1], device=coarse.device) * self.pool
        local, sinks = layout.local_BQ[:, tiles, None], layout.sink_hi_BQ[:, tiles, None]
        holds = ((block < local) & (block + self.pool > sinks))[:, None]
        coarse = comparable(coarse).masked_fill(~holds, -torch.inf)
        wanted = torch.full_like(coarse[..., 0], self.survivors, dtype=torch.long)
        best = top_blocks(coarse, wanted, min(self.survivors, coarse.shape[-1])).long()
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
        return Scored(scores, allowed, columns)


def _members(columns: Tensor, block: int) -> Tensor:
    """[..., M * block]: the keys of each block."""
    key = torch.arange(block, device=columns.device)
    return (columns[..., None] * block + key).flatten(-2)
