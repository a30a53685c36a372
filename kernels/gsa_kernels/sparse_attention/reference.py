"""Oracle for sparse attention: a T x S mask and one softmax. Any dtype, float64 included."""

import torch
from torch import Tensor

from gsa_kernels.selection import Selection

from .api import AttentionResult


def attend(
    q_BTHE: Tensor,
    k_BSKE: Tensor,
    v_BSKE: Tensor,
    selection: Selection,
    bias_BHQN: Tensor | None,
    scale: float,
    need_lse: bool,
    need_mass: bool,
) -> AttentionResult:
    group = q_BTHE.shape[2] // k_BSKE.shape[2]
    k = k_BSKE.repeat_interleave(group, 2)
    v = v_BSKE.repeat_interleave(group, 2)
    mask = _per_head(selection.to_dense_mask(), q_BTHE.shape[2])
    logits = torch.einsum("bthe,bshe->bhts", q_BTHE, k) * scale
    if bias_BHQN is not None:
        logits = logits + _per_head(_spread(bias_BHQN, selection), q_BTHE.shape[2])
    logits = logits.masked_fill(~mask, -torch.inf)
    probability = logits.softmax(-1)
    out = torch.einsum("bhts,bshe->bthe", probability, v)
    lse = logits.logsumexp(-1).transpose(1, 2) if need_lse else None
    mass = selected_mass(probability.detach(), selection) if need_mass else None
    return AttentionResult(out, lse, mass)


def selected_mass(probability_BHTS: Tensor, selection: Selection) -> Tensor:
    """[B, Hs, Q, N]: mass of each selected block, mean over the tile's queries and heads."""
    c, r = selection.spec.key_block, selection.spec.query_tile
    blocks = selection.blocks_BHQN
    batch, groups, tiles, slots = blocks.shape
    p = probability_BHTS.unflatten(1, (groups, -1)).mean(2)
    mass = p.new_zeros(batch, groups, tiles, slots)
    for i in range(tiles):
        anchor = int(selection.layout.anchor_Q[i])
        low = max(anchor, selection.q_start) - selection.q_start
        high = min(anchor + r, selection.q_start + selection.n_queries) - selection.q_start
        rows = p[:, :, low:high].mean(2)
        for n in range(slots):
            for b in range(batch):
                for h in range(groups):
                    j = int(blocks[b, h, i, n])
                    if j >= 0:
                        mass[b, h, i, n] = rows[b, h, j * c : (j + 1) * c].sum()
    return mass


def _spread(bias_BHQN: Tensor, selection: Selection) -> Tensor:
    """[B, Hs, T, S]: the bias of each pair, 0 outside the selected blocks."""
    c, r = selection.spec.key_block, selection.spec.query_tile
    blocks = selection.blocks_BHQN.long()
    n_blocks = selection.layout.n_blocks
    grid = bias_BHQN.new_zeros(*blocks.shape[:3], n_blocks + 1)
    index = blocks.masked_fill(blocks < 0, n_blocks)
    grid = grid.scatter_add(-1, index, bias_BHQN.masked_fill(blocks < 0, 0))[..., :-1]
    tile = torch.arange(selection.q_start, selection.q_start + selection.n_queries)
    tile = tile // r - selection.q_start // r
    wide = grid[:, :, tile.to(grid.device)].repeat_interleave(c, -1)
    return wide[..., : selection.n_keys]


def _per_head(x_BHTS: Tensor, heads: int) -> Tensor:
    return x_BHTS.repeat_interleave(heads // x_BHTS.shape[1], 1)
