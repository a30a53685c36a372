"""The streamed selection: a few tiles at a time, their scores, statistics, budgets, top-k."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from gsa_kernels.index_score.api import BlockScores, Scored
from gsa_kernels.selection import Selection, SelectionSpec, n_tiles
from gsa_kernels.topk import comparable

from .api import BudgetRule, Chosen
from .statistics import TAIL, candidate_statistics


class Rows(ABC):
    """How the tiles of one call are scored and their blocks chosen. Tiles count from the call's
    first; n_blocks is how many blocks the last of them can reach."""

    @abstractmethod
    def stop(self, tile: int) -> int:
        """One past the last tile to hold the scores of together with `tile`'s."""

    @abstractmethod
    def score(self, tiles: slice, n_blocks: int) -> Scored: ...

    def statistics(
        self, scored: Scored, tiles: slice, names: tuple[str, ...], n_blocks: int
    ) -> dict[str, Tensor]:
        """The statistics named, [B, H, tiles, ...] float32 each."""
        return candidate_statistics(scored.scores, scored.allowed, names)

    @abstractmethod
    def choose(
        self, scored: Scored, tiles: slice, wanted: int | Tensor, most: int, n_blocks: int
    ) -> Tensor:
        """[B, H, tiles, at most `most`] int32 blocks of the best candidates, ascending, -1 last.
        wanted: how many, never more than `most`."""


def run(
    rows: Rows,
    factors: BlockScores,
    spec: SelectionSpec,
    budget: int | BudgetRule,
    max_keys: int,
    n_queries: int,
    doc_start_BS: Tensor | None,
    previous: Selection | None,
    names: tuple[str, ...],
    prove: bool = False,
) -> Chosen:
    """See api.select. Costs (T/R)(S/C) scores for mean-key blocks, (T/R) S for exact ones."""
    c, start = spec.key_block, factors.q_start
    device = factors.k_BSI.device
    batch, n_keys = factors.k_BSI.shape[:2]
    width, tiles = spec.max_blocks(max_keys, n_keys), n_tiles(spec, n_queries, start)
    lists = (batch, factors.heads)
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    tile = 1 if start % spec.query_tile else 0
    whole = tile == 0 and tiles > 0 and rows.stop(0) >= tiles  # one chunk: nothing to copy
    blocks = None
    if not whole:
        blocks = torch.full((*lists, tiles, width), -1, dtype=torch.int32, device=device)
    if tile:
        assert previous is not None and blocks is not None
        kept = previous.blocks_BHQN[:, :, -1, :width]
        blocks[:, :, 0, : kept.shape[-1]] = kept
    if not whole:
        for name, parts in found.items():
            parts.append(torch.zeros(*lists, tile, *TAIL.get(name, ()), device=device))
    proofs = [torch.zeros(*lists, tile, dtype=torch.bool, device=device)] if prove else []
    while tile < tiles:
        stop = min(tiles, rows.stop(tile))
        part = slice(tile, stop)
        anchor = (start // spec.query_tile + stop - 1) * spec.query_tile
        n_blocks = max(0, anchor - spec.window + 1) // c
        shape = (*lists, stop - tile)
        if n_blocks and (width or names or prove):
            scored = rows.score(part, n_blocks)
            values = rows.statistics(scored, part, names, n_blocks)
        else:
            none = torch.zeros(*shape, 0, device=device)
            scored = Scored(none, none.bool())
            values = candidate_statistics(none, scored.allowed, names)
        for name, parts in found.items():
            parts.append(values[name])
        keys = budget(values) if callable(budget) else budget
        wanted = blocks_wanted(keys, spec, width, shape, device)
        if prove:
            proofs.append(proven(scored, wanted))
        if n_blocks and width:
            picked = rows.choose(scored, part, wanted, width, n_blocks)
        else:
            picked = torch.full((*shape, 0), -1, dtype=torch.int32, device=device)
        if blocks is None:
            missing = width - picked.shape[-1]
            blocks = F.pad(picked, (0, missing), value=-1) if missing else picked
        else:
            blocks[:, :, part, : picked.shape[-1]] = picked
        tile = stop
    assert blocks is not None
    selection = Selection(spec, blocks, n_queries, n_keys, start, doc_start_BS)
    stats = {n: torch.cat(x, 2) if len(x) > 1 else x[0] for n, x in found.items()}
    return Chosen(selection, stats, torch.cat(proofs, 2) if prove else None)


def proven(scored: Scored, wanted: int | Tensor) -> Tensor:
    """[B, H, tiles] bool: whether the best of all candidates are among those scored."""
    if scored.unseen is None:  # no candidates at all
        return torch.ones(scored.scores.shape[:-1], dtype=torch.bool, device=scored.scores.device)
    unseen = scored.unseen()
    above = (comparable(scored.scores) > unseen[..., None]) & scored.allowed
    return (above.sum(-1) >= wanted) | (unseen == -torch.inf)


def blocks_wanted(
    keys: int | Tensor,
    spec: SelectionSpec,
    width: int,
    shape: tuple[int, ...],
    device: torch.device,
) -> int | Tensor:
    """Blocks to choose for budgets in keys, [B, H, tiles] unless one number, at most `width`."""
    if isinstance(keys, int):
        return min(spec.blocks_for(keys), width)
    keys = keys.to(device).expand(shape)
    left = (keys - spec.window - spec.sink_keys).clamp_min(0) // spec.key_block
    return left.clamp_max(width)
