"""Oracle for the indexer's KL losses: loops over tiles, whole matrices, one formula."""

import torch
from torch import Tensor

from gsa_kernels.index_score.api import IndexFactors
from gsa_kernels.index_score.reference import block_score_matrix
from gsa_kernels.selection import SelectionSpec


def kl(
    factors: IndexFactors,
    probability_BHTS: Tensor,
    spec: SelectionSpec,
    candidates: list[list[list[list[int]]]],
    doc_start_BS: Tensor | None = None,
    distribution: str = "softmax",
) -> Tensor:
    """Mean over (b, h, tile) with two or more candidates of KL(p || s).

    candidates[b][h][i] lists the blocks of tile i; probability_BHTS is attention, q_start = 0.
    """
    c, r = spec.key_block, spec.query_tile
    scores = block_score_matrix(factors, c, doc_start_BS)
    queries = probability_BHTS.shape[2]
    p = probability_BHTS.unflatten(1, (factors.heads, -1)).mean(2)
    losses = []
    for b, heads in enumerate(candidates):
        for h, tiles in enumerate(heads):
            for i, blocks in enumerate(tiles):
                if len(blocks) < 2:
                    continue
                rows = p[b, h, i * r : min(queries, (i + 1) * r)].mean(0)
                target = torch.stack([rows[j * c : (j + 1) * c].sum() for j in blocks])
                target = target / target.sum().clamp_min(1e-30)
                score = scores[b, h, i * r][blocks]
                if distribution == "log":
                    s = (score + 1e-6) / (score + 1e-6).sum()
                else:
                    s = score.softmax(-1)
                losses.append((target * (target.clamp_min(1e-30) / s).log()).sum())
    return torch.stack(losses).mean() if losses else scores.sum() * 0
