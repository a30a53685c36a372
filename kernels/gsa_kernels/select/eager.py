"""Chunked selection in plain PyTorch: a few anchors against all keys at a time."""

import math

import torch
from torch import Tensor

from gsa_kernels.index_score.api import _CHUNK, IndexFactors, pool_keys, score_tile
from gsa_kernels.selection import Selection, SelectionSpec, tile_layout

from .api import BudgetRule, Chosen, comparable


def select(
    factors: IndexFactors,
    spec: SelectionSpec,
    budget: int | BudgetRule,
    max_keys: int,
    n_queries: int,
    doc_start_BS: Tensor | None,
    previous: Selection | None,
    statistics: bool,
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
    names = ("count", "mean", "variance") if statistics or callable(budget) else ()
    stats = {
        name: torch.zeros(batch, heads, layout.n_tiles, device=device, dtype=torch.float32)
        for name in names
    }
    pooled = pool_keys(factors.k_BSI, c, doc_start_BS)
    mean = c == 1 or factors.block_score == "mean"
    tile = first
    while tile < layout.n_tiles:
        # Most tiles n whose n rows of keys up to the last one's reach, n (reach + n R), fit.
        reach, r = int(layout.anchor_Q[tile]) + 1, spec.query_tile
        room = _CHUNK[device.type] * (c if mean else 1) // (batch * factors.q_BTJI.shape[2])
        n = (math.isqrt(reach * reach + 4 * r * room) - reach) // (2 * r)
        stop = min(layout.n_tiles, tile + max(1, n))
        part = slice(tile, stop)
        n_blocks = max(0, (int(layout.anchor_Q[stop - 1]) - spec.window + 1)) // c
        anchors = layout.anchor_Q[part] - start
        if n_blocks:
            scores = score_tile(factors.rows(anchors), c, n_blocks, doc_start_BS, pooled)
            allowed = layout.candidates(part, n_blocks)[:, None]
        else:
            scores = factors.weight_BTJ.new_zeros(batch, heads, stop - tile, 0)
            allowed = torch.ones_like(scores, dtype=torch.bool)
        for name, value in candidate_statistics(scores, allowed, names).items():
            stats[name][:, :, part] = value
        keys = budget({k: v[:, :, part] for k, v in stats.items()}) if callable(budget) else budget
        wanted = blocks_wanted(keys, spec, width, scores.shape[:3], device)
        if n_blocks and width:
            scores = comparable(scores).masked_fill(~allowed, -torch.inf)
            picked = top_blocks(scores, wanted, min(width, n_blocks))
            blocks[:, :, part, : picked.shape[-1]] = picked
        tile = stop
    selection = Selection(spec, blocks, n_queries, n_keys, start, doc_start_BS)
    return Chosen(selection, stats)


def blocks_wanted(
    keys: int | Tensor, spec: SelectionSpec, width: int, shape: torch.Size, device: torch.device
) -> Tensor:
    """[B, H, tiles] blocks to choose for budgets in keys, never more than the list is wide."""
    keys = torch.as_tensor(keys, device=device).expand(shape)
    left = (keys - spec.window - spec.sink_keys).clamp_min(0) // spec.key_block
    return left.clamp_max(width)


def candidate_statistics(
    scores: Tensor, allowed: Tensor, names: tuple[str, ...]
) -> dict[str, Tensor]:
    """Count, mean and (population) variance over the candidates only; 0 where there are none."""
    if not names:
        return {}
    allowed = allowed.expand_as(scores)
    count = allowed.sum(-1)
    safe = count.clamp_min(1)
    mean = scores.masked_fill(~allowed, 0).float().sum(-1) / safe
    spread = (scores.float() - mean[..., None]).masked_fill(~allowed, 0)
    return {"count": count.float(), "mean": mean, "variance": spread.square().sum(-1) / safe}


def top_blocks(scores: Tensor, wanted: Tensor, width: int) -> Tensor:
    """[..., width] int32 columns of the `wanted` largest scores, ascending, padded with -1.

    Ties go to the lowest column; -inf is never chosen. Raises ValueError on NaN.
    """
    best = scores.topk(width, -1).values
    if best.isnan().any():
        raise ValueError("index scores are not finite (NaN): lower the learning rate")
    wanted = torch.minimum(wanted, (best > -torch.inf).sum(-1))
    threshold = best.gather(-1, (wanted - 1).clamp_min(0)[..., None])
    above = scores > threshold
    ties = scores == threshold
    room = wanted[..., None] - above.sum(-1, keepdim=True)
    keep = (above | (ties & (ties.cumsum(-1) <= room))) & (wanted[..., None] > 0)
    place = keep.cumsum(-1) - 1
    out = torch.full((*scores.shape[:-1], width + 1), -1, dtype=torch.int32, device=scores.device)
    column = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)
    place = place.masked_fill(~keep, width)
    out.scatter_(-1, place, column.expand_as(scores))
    return out[..., :width]
