"""What a selection asks of an indexer: scores of key blocks, a few query tiles at a time.

Legend: B batch, T queries, S keys, H selection heads, Q query tiles, C keys per block.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gsa_kernels.selection import Selection, TileLayout

_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 27}  # score elements held at once


@dataclass(frozen=True)
class Scored:
    """Scores of some tiles' blocks, with those that may be chosen: both [B, H, tiles, M].

    Entry j belongs to block j, or to block columns[..., j] where columns are given (ascending in
    the allowed entries). `allowed` may be [B or 1, 1, tiles, M]. unseen: computes [B, H, tiles],
    `comparable` numbers that no candidate left out here exceeds, -inf where none is; None if no
    such number is known.
    """

    scores: Tensor
    allowed: Tensor
    columns: Tensor | None = None
    unseen: Callable[[], Tensor] | None = None


def undefined(scores: object, name: str) -> NotImplementedError:
    """For what a score function must define and does not."""
    return NotImplementedError(f"{type(scores).__name__} does not define {name}")


class BlockScores:
    """Base of every score function. A subclass defines `tile_scores`, `with_keys`, `n_queries`.

    k_BSI: index keys, cached while decoding (width 0 if the scores need none). heads: H.
    q_start: absolute position of the first query. A tile's scores may depend on positions up to
    its anchor only: training scores all tiles at once, decoding one, with the keys so far.
    """

    k_BSI: Tensor
    heads: int
    q_start: int

    @property
    def n_queries(self) -> int:
        raise undefined(self, "n_queries")

    @property
    def bound(self) -> float:
        """Largest possible score; inf if there is none."""
        return math.inf

    def with_keys(self, k_BSI: Tensor) -> "BlockScores":
        """The same queries against other keys (those of a cache)."""
        raise undefined(self, "with_keys()")

    def remember(self, memory: Any) -> "BlockScores":
        """The same factors, which keep in `memory` what later steps of a decoding need of the keys
        so far: index_pooled_BMI, extended as the host's cache of keys (LayerCache)."""
        return self

    def prepare(self, block: int, doc_start_BS: Tensor | None) -> Any:
        """Work that all tiles share, done once per call (keys pooled by block)."""
        return doc_start_BS

    def tile_scores(
        self, layout: TileLayout, tiles: slice, n_blocks: int, prepared: Any
    ) -> Tensor:
        """[B, H, tiles, n_blocks] scores of the first blocks at the anchors of the tiles."""
        raise undefined(self, "tile_scores()")

    def scored(self, layout: TileLayout, tiles: slice, n_blocks: int, prepared: Any) -> Scored:
        """What the tiles may choose from: every candidate block, unless overridden."""
        scores = self.tile_scores(layout, tiles, n_blocks, prepared)
        return Scored(scores, layout.candidates(tiles, n_blocks)[:, None])

    def elements(self, block: int) -> int:
        """Numbers held per tile and block while scoring; sizes the chunks."""
        return self.heads

    def tiles_at_once(self, layout: TileLayout, tile: int) -> int:
        """How many tiles from `tile` on to score in one chunk."""
        c, r = layout.spec.key_block, layout.spec.query_tile
        # Most tiles n whose n rows of keys up to the last one's reach, n (reach + n R), fit.
        reach = layout.anchor(tile) + 1
        room = _CHUNK[self.k_BSI.device.type] * c // (self.k_BSI.shape[0] * self.elements(c))
        return max(1, (math.isqrt(reach * reach + 4 * r * room) - reach) // (2 * r))

    def at(self, selection: Selection) -> Tensor:
        """[B, H, Q, N] scores of the selected blocks; -inf in empty slots.

        This one scores every block of each tile and picks; a subclass may do better.
        """
        layout, blocks = selection.layout, selection.blocks_BHQN
        prepared = self.prepare(selection.spec.key_block, selection.doc_start_BS)
        pieces, tile = [], 0
        while tile < layout.n_tiles and blocks.shape[-1]:
            stop = min(layout.n_tiles, tile + self.tiles_at_once(layout, tile))
            chosen = blocks[:, :, tile:stop].long()
            n_blocks = max(1, int(chosen.amax()) + 1)
            scores = self.tile_scores(layout, slice(tile, stop), n_blocks, prepared)
            pieces.append(scores.gather(-1, chosen.clamp_min(0)))
            tile = stop
        scores = (
            torch.cat(pieces, 2) if pieces else torch.zeros(blocks.shape, device=blocks.device)
        )
        return scores.masked_fill(blocks < 0, -torch.inf)


def scores_at(factors: BlockScores, selection: Selection) -> Tensor:
    """[B, H, Q, N] scores of the selected blocks, differentiable; -inf in empty slots.

    A tile whose anchor lies before q_start (decoding goes on inside a tile) has no query here:
    ValueError.
    """
    r = selection.spec.query_tile
    if selection.q_start % r:
        raise ValueError(f"scores need whole tiles: q_start {selection.q_start} is not {r} x n")
    return factors.at(selection)
