"""Selection in plain PyTorch: a few anchors against all keys at a time."""

import torch
from torch import Tensor

from gsa_kernels.index_score.api import BlockScores, Scored
from gsa_kernels.selection import TileLayout
from gsa_kernels.topk import comparable, top_blocks

from .chunked import Rows


class EagerRows(Rows):
    """The factors' own scores and a sort."""

    def __init__(
        self, factors: BlockScores, layout: TileLayout, doc_start_BS: Tensor | None
    ) -> None:
        self.factors, self.layout = factors, layout
        self.prepared = factors.prepare(layout.spec.key_block, doc_start_BS)

    def stop(self, tile: int) -> int:
        return tile + self.factors.tiles_at_once(self.layout, tile)

    def score(self, tiles: slice, n_blocks: int) -> Scored:
        return self.factors.scored(self.layout, tiles, n_blocks, self.prepared)

    def choose(
        self, scored: Scored, tiles: slice, wanted: int | Tensor, most: int, n_blocks: int
    ) -> Tensor:
        scores = comparable(scored.scores).masked_fill(~scored.allowed, -torch.inf)
        if isinstance(wanted, int):
            wanted = torch.full(scores.shape[:-1], wanted, device=scores.device)
        return named(top_blocks(scores, wanted, min(most, scores.shape[-1])), scored)


def named(picked: Tensor, scored: Scored) -> Tensor:
    """Block numbers of the columns picked."""
    if scored.columns is None:
        return picked
    block = scored.columns.gather(-1, picked.clamp_min(0).long())
    return block.to(torch.int32).masked_fill(picked < 0, -1)
