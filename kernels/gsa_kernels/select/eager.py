"""Chunked selection in plain PyTorch: a few anchors against all keys at a time."""

import torch
from torch import Tensor

from gsa_kernels.index_score.api import BlockScores, Scored
from gsa_kernels.selection import Selection, SelectionSpec, tile_layout
from gsa_kernels.topk import comparable, top_blocks

from .api import BudgetRule, Chosen
from .statistics import TAIL, candidate_statistics


def select(
    factors: BlockScores,
    spec: SelectionSpec,
    budget: int | BudgetRule,
    max_keys: int,
    n_queries: int,
    doc_start_BS: Tensor | None,
    previous: Selection | None,
    names: tuple[str, ...],
) -> Chosen:
    """See api.select. Costs (T/R)(S/C) scores for mean-key blocks, (T/R) S for exact ones."""
    c, start = spec.key_block, factors.q_start
    device = factors.k_BSI.device
    n_keys = factors.k_BSI.shape[1]
    layout = tile_layout(spec, n_queries, n_keys, start, doc_start_BS, device)
    batch, heads = factors.k_BSI.shape[0], factors.heads
    width = spec.max_blocks(max_keys, n_keys)
    blocks = torch.full(
        (batch, heads, layout.n_tiles, width), -1, dtype=torch.int32, device=device
    )
    first = 0
    if start % spec.query_tile:
        assert previous is not None
        kept = previous.blocks_BHQN[:, :, -1]
        blocks[:, :, 0, : kept.shape[-1]] = kept[..., :width]
        first = 1
    stats = {
        name: torch.zeros(batch, heads, layout.n_tiles, *TAIL.get(name, ()), device=device)
        for name in names
    }
    prepared = factors.prepare(c, doc_start_BS)
    tile = first
    while tile < layout.n_tiles:
        stop = min(layout.n_tiles, tile + factors.tiles_at_once(layout, tile))
        part = slice(tile, stop)
        n_blocks = max(0, layout.anchor(stop - 1) - spec.window + 1) // c
        shape = (batch, heads, stop - tile)
        if n_blocks:
            scored = factors.scored(layout, part, n_blocks, prepared)
        else:
            none = torch.zeros(*shape, 0, device=device)
            scored = Scored(none, none.bool())
        found = candidate_statistics(scored.scores, scored.allowed, names)
        for name, kept in stats.items():
            kept[:, :, part] = found[name]
        keys = budget(found) if callable(budget) else budget
        wanted = blocks_wanted(keys, spec, width, shape, device)
        if n_blocks and width:
            picked = choose(scored, wanted, width)
            blocks[:, :, part, : picked.shape[-1]] = picked
        tile = stop
    selection = Selection(spec, blocks, n_queries, n_keys, start, doc_start_BS)
    return Chosen(selection, stats)


def blocks_wanted(
    keys: int | Tensor,
    spec: SelectionSpec,
    width: int,
    shape: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """[B, H, tiles] blocks to choose for budgets in keys, never more than the list is wide."""
    if isinstance(keys, int):
        keys = torch.full(shape, keys, device=device)
    keys = keys.to(device).expand(shape)
    left = (keys - spec.window - spec.sink_keys).clamp_min(0) // spec.key_block
    return left.clamp_max(width)


def choose(scored: Scored, wanted: Tensor, width: int) -> Tensor:
    """[B, H, tiles, at most width] int32 blocks of the best candidates, ascending, -1 last."""
    scores = comparable(scored.scores).masked_fill(~scored.allowed, -torch.inf)
    picked = top_blocks(scores, wanted, min(width, scores.shape[-1]))
    if scored.columns is None:
        return picked
    block = scored.columns.gather(-1, picked.clamp_min(0).long())
    return block.to(torch.int32).masked_fill(picked < 0, -1)
