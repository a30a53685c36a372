"""Oracle for selection: one tile at a time, in Python, from the whole score matrix."""

import torch
from torch import Tensor

from gsa_kernels.index_score.api import IndexFactors
from gsa_kernels.index_score.reference import block_score_matrix
from gsa_kernels.selection import Selection, SelectionSpec

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
    """The definition: sort the candidates of each anchor by (score down, position up)."""
    c, r, start = spec.key_block, spec.query_tile, factors.q_start
    n_keys = factors.k_BSI.shape[1]
    batch, heads = factors.k_BSI.shape[0], factors.heads
    width = spec.max_blocks(max_keys, n_keys)
    scores = block_score_matrix(factors, c, doc_start_BS)
    compared = comparable(scores)
    first_tile, last_tile = start // r, -(-(start + n_queries) // r)
    tiles = last_tile - first_tile
    blocks = torch.full((batch, heads, tiles, width), -1, dtype=torch.int32)
    stats = {name: torch.zeros(batch, heads, tiles) for name in ("count", "mean", "variance")}
    for b in range(batch):
        for h in range(heads):
            for i in range(tiles):
                anchor = (first_tile + i) * r
                if anchor < start:
                    assert previous is not None
                    kept = previous.blocks_BHQN[b, h, -1]
                    blocks[b, h, i, : len(kept)] = kept[:width]
                    continue
                doc = 0 if doc_start_BS is None else int(doc_start_BS[b, anchor])
                local = max(0, anchor - spec.window + 1) // c
                low = -(-(doc + spec.sinks) // c) if spec.sinks else doc // c
                candidates = list(range(low, local))
                values = scores[b, h, anchor - start, low:local].float()
                if candidates:
                    stats["count"][b, h, i] = len(candidates)
                    stats["mean"][b, h, i] = values.mean()
                    stats["variance"][b, h, i] = values.var(correction=0)
                if callable(budget):
                    one = {n: v[b : b + 1, h : h + 1, i : i + 1] for n, v in stats.items()}
                    keys = int(budget(one))
                else:
                    keys = budget
                n = min(spec.blocks_for(keys), width)
                order = sorted(
                    candidates, key=lambda j: (-float(compared[b, h, anchor - start, j]), j)
                )
                chosen = sorted(order[:n])
                blocks[b, h, i, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    blocks = blocks.to(factors.k_BSI.device)
    selection = Selection(spec, blocks, n_queries, n_keys, start, doc_start_BS)
    return Chosen(selection, stats if statistics or callable(budget) else {})
