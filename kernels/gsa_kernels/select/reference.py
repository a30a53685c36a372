"""Oracle for selection: one tile at a time, in Python, from the whole score matrix."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from gsa_kernels.index_score.api import (
    BlockScores,
    HierarchicalFactors,
    IndexFactors,
    PooledFactors,
)
from gsa_kernels.index_score.reference import block_score_matrix, pooled_score
from gsa_kernels.selection import Selection, SelectionSpec, TileLayout, tile_layout
from gsa_kernels.topk import comparable

from .api import BudgetRule, Chosen
from .statistics import BINS, TAIL


def select(
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
    """The definition: sort the candidates of each anchor by (score down, position up)."""
    c, start = spec.key_block, factors.q_start
    n_keys = factors.k_BSI.shape[1]
    batch, heads = factors.k_BSI.shape[0], factors.heads
    width = spec.max_blocks(max_keys, n_keys)
    layout = tile_layout(spec, n_queries, n_keys, start, doc_start_BS, factors.k_BSI.device)
    rows = score_rows(factors, layout, doc_start_BS)
    tiles = layout.n_tiles
    blocks = torch.full((batch, heads, tiles, width), -1, dtype=torch.int32)
    stats = {name: torch.zeros(batch, heads, tiles, *TAIL.get(name, ())) for name in names}
    proven = torch.zeros(batch, heads, tiles, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for i in range(tiles):
                anchor = int(layout.anchor_Q[i])
                if anchor < start:
                    assert previous is not None
                    kept = previous.blocks_BHQN[b, h, -1]
                    blocks[b, h, i, : len(kept)] = kept[:width]
                    continue
                doc = 0 if doc_start_BS is None else int(doc_start_BS[b, anchor])
                local = max(0, anchor - spec.window + 1) // c
                low = -(-(doc + spec.sinks) // c) if spec.sinks else doc // c
                values = {j: rows(b, h, i)[j].float() for j in range(low, local)}
                left_out = -math.inf
                if isinstance(factors, HierarchicalFactors):
                    pools = coarse_order(factors, layout, doc_start_BS, b, h, i, sorted(values))
                    kept_pools = list(pools)[: factors.survivors]
                    left_out = max([-math.inf, *list(pools.values())[factors.survivors :]])
                    values = {
                        j: v for j, v in values.items() if j * c // factors.pool in kept_pools
                    }
                found = describe(list(values.values()), names)
                for name, kept in stats.items():
                    kept[b, h, i] = found[name]
                keys = budget
                if callable(budget):
                    keys = int(budget({n: v[None, None, None] for n, v in found.items()}))
                assert isinstance(keys, int)
                n = min(spec.blocks_for(keys), width)
                order = sorted(values, key=lambda j: (-float(comparable(values[j])), j))
                chosen = sorted(order[:n])
                above = sum(float(comparable(v)) > left_out for v in values.values())
                proven[b, h, i] = left_out == -math.inf or above >= n
                blocks[b, h, i, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    blocks = blocks.to(factors.k_BSI.device)
    stats = {name: x.to(blocks.device) for name, x in stats.items()}
    selection = Selection(spec, blocks, n_queries, n_keys, start, doc_start_BS)
    return Chosen(selection, stats, proven.to(blocks.device) if prove else None)


def score_rows(
    factors: BlockScores, layout: TileLayout, doc_start_BS: Tensor | None
) -> Callable[[int, int, int], Tensor]:
    """(b, h, tile) -> scores of every block at the tile's anchor."""
    c = layout.spec.key_block
    n_blocks = layout.n_keys // c
    if type(factors) in (IndexFactors, HierarchicalFactors):
        assert isinstance(factors, IndexFactors)
        matrix = block_score_matrix(factors, c, doc_start_BS)
        return lambda b, h, i: matrix[b, h, int(layout.anchor_Q[i]) - factors.q_start]
    if isinstance(factors, PooledFactors):
        pooled = functools.partial(pool_score, factors, layout, doc_start_BS)
        keys = range(0, n_blocks * c, c)
        return functools.cache(lambda b, h, i: torch.stack([pooled(b, h, i, s) for s in keys]))
    prepared = factors.prepare(c, doc_start_BS)

    @functools.cache
    def row(i: int) -> Tensor:
        return factors.tile_scores(layout, slice(i, i + 1), n_blocks, prepared)

    return lambda b, h, i: row(i)[b, h, 0]


def pool_score(
    factors: PooledFactors | HierarchicalFactors,
    layout: TileLayout,
    doc_start_BS: Tensor | None,
    b: int,
    h: int,
    i: int,
    key: int,
) -> Tensor:
    """Score of the pooling block that holds a key: of its keys before the window, in the
    anchor's document. -inf if there are none."""
    anchor, local = int(layout.anchor_Q[i]), int(layout.local_BQ[0, i])
    low = key // factors.pool * factors.pool
    high = min(low + factors.pool, local)
    if doc_start_BS is not None:
        low = max(low, int(doc_start_BS[b, anchor]))
    if low >= high:
        return torch.tensor(-math.inf)
    keys = factors.k_BSI[b, low:high]
    return pooled_score(factors, b, anchor - factors.q_start, keys, factors.pooling)[h].float()


def coarse_order(
    factors: HierarchicalFactors,
    layout: TileLayout,
    doc_start_BS: Tensor | None,
    b: int,
    h: int,
    i: int,
    candidates: list[int],
) -> dict[int, float]:
    """Scores of the pooling blocks that hold a candidate, as compared, the best first."""
    pools = sorted({j * layout.spec.key_block // factors.pool for j in candidates})
    score = {
        p: float(comparable(pool_score(factors, layout, doc_start_BS, b, h, i, p * factors.pool)))
        for p in pools
    }
    return {p: score[p] for p in sorted(pools, key=lambda p: (-score[p], p))}


def describe(values: list[Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    """The statistics of a list of scores, by their textbook formulas."""
    x = torch.stack(values).double().cpu() if values else torch.zeros(0, dtype=torch.float64)
    found = {name: torch.zeros(TAIL.get(name, ())) for name in names}
    if "count" in names:
        found["count"] = torch.tensor(float(len(x)))
    if not len(x):
        return found
    if "mean" in names:
        found["mean"] = x.mean().float()
    if "variance" in names:
        found["variance"] = x.var(correction=0).float()
    if "max" in names:
        found["max"] = x.max().float()
    positive = x.clamp_min(0)
    if "entropy" in names and positive.sum() > 0:
        p = positive / positive.sum()
        found["entropy"] = (-torch.xlogy(p, p).sum() - math.log(len(x))).float()
    if "histogram" in names:
        edges = [2.0 ** (i // 8 - 24) * (1 + i % 8 / 8) for i in range(1, BINS)]
        edge = torch.tensor(edges, dtype=torch.float64)
        bins = torch.bucketize(comparable(x).double(), edge, right=True)
        found["histogram"] = torch.bincount(bins, minlength=BINS).float()
    return found
