"""Oracle for index scores: the whole T x S matrix, one formula."""

import torch
from torch import Tensor

from .api import IndexFactors


def score_matrix(factors: IndexFactors) -> Tensor:
    """[B, H, T, S] scores, written as the paper writes them."""
    logits = torch.einsum("btji,bsi->btjs", factors.q_BTJI, factors.keys_BSI) * factors.scale
    if factors.bias_J is not None:
        logits = logits + factors.bias_J[None, None, :, None]
    active = logits.sigmoid() if factors.activation == "sigmoid" else logits.relu()
    weighted = factors.weight_BTJ[..., None] * active
    batch, queries, heads, keys = weighted.shape
    grouped = weighted.view(batch, queries, factors.heads, heads // factors.heads, keys)
    return grouped.sum(3).transpose(1, 2)


def block_score_matrix(
    factors: IndexFactors, block: int, doc_start_BS: Tensor | None = None
) -> Tensor:
    """[B, H, T, S // block] block scores: from the mean key, or the largest of the keys."""
    keys_BSI = factors.keys_BSI
    batch, keys, _ = keys_BSI.shape
    columns = []
    for j in range(keys // block):
        part = []
        for b in range(batch):
            low = j * block
            if doc_start_BS is not None:
                low = max(low, int(doc_start_BS[b, (j + 1) * block - 1]))
            keys_b = keys_BSI[b : b + 1, low : (j + 1) * block]
            if factors.block_score == "mean":
                keys_b = keys_b.mean(1, keepdim=True)
            one = IndexFactors(
                factors.q_BTJI[b : b + 1],
                keys_b,
                factors.weight_BTJ[b : b + 1],
                factors.bias_J,
                factors.scale,
                factors.activation,
                factors.block_score,
                factors.heads,
            )
            part.append(score_matrix(one).amax(-1))
        columns.append(torch.cat(part))
    if not columns:
        return factors.weight_BTJ.new_zeros(batch, factors.heads, factors.q_BTJI.shape[1], 0)
    return torch.stack(columns, -1)


def pooled_score(
    factors: IndexFactors, b: int, query: int, keys_SI: Tensor, pooling: str
) -> Tensor:
    """[H] scores of one query (offset from q_start) for the mean or maximum of some keys.

    pooling "bound": sum_j w_j act(sum_i max(q_ji max_i, q_ji min_i) scale + b_j).
    """
    if pooling == "bound":
        q = factors.q_BTJI[b, query]
        logits = torch.maximum(q * keys_SI.amax(0), q * keys_SI.amin(0)).sum(-1) * factors.scale
        if factors.bias_J is not None:
            logits = logits + factors.bias_J
        return (factors.weight_BTJ[b, query] * logits.sigmoid()).view(factors.heads, -1).sum(-1)
    key = keys_SI.mean(0) if pooling == "mean" else keys_SI.amax(0)
    one = IndexFactors(
        factors.q_BTJI[b : b + 1, query : query + 1],
        key[None, None],
        factors.weight_BTJ[b : b + 1, query : query + 1],
        factors.bias_J,
        factors.scale,
        factors.activation,
        factors.block_score,
        factors.heads,
    )
    return score_matrix(one)[0, :, 0, 0]
