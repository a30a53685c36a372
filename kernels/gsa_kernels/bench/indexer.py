"""Records of scoring, selection and the indexer's objective.

topk_ms is the plain way over the same scores: torch.topk and a sort. Single keys of long rows are
chosen as they are scored: select_ms then holds both. A coarse-to-fine indexer is measured against
the exact choice of the same factors: recall is the share of the exact blocks that it found, the
cost its time and the keys or blocks it scored for each tile (a bound is a product of twice the
width and counts as two).
"""

import itertools
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from gsa_kernels.index_score.api import BOUND, HierarchicalFactors, IndexFactors
from gsa_kernels.indexer_loss.api import dense_kl, selected_kl
from gsa_kernels.select import select
from gsa_kernels.select.api import Chosen
from gsa_kernels.selection import TileLayout, tile_layout
from gsa_kernels.sparse_attention import sparse_attention

from .case import Case, Shape
from .timing import milliseconds, peak_bytes
from .verify import recall


def topk_blocks(case: Case) -> Tensor:
    """[B, H, Q, N] blocks by torch.topk of the streamed scores, ascending, -1 at the end."""
    factors, spec = case.factors, case.spec
    layout = _layout(case)
    n = case.q.shape[1]
    width = spec.max_blocks(case.budget, n)
    prepared = factors.prepare(spec.key_block, None)
    wanted = min(spec.blocks_for(case.budget), width)
    pieces, tile = [], 0
    while tile < layout.n_tiles:
        stop = min(layout.n_tiles, tile + factors.tiles_at_once(layout, tile))
        n_blocks = max(0, layout.anchor(stop - 1) - spec.window + 1) // spec.key_block
        shape = (factors.k_BSI.shape[0], factors.heads, stop - tile, width)
        if n_blocks and wanted:
            scored = factors.scored(layout, slice(tile, stop), n_blocks, prepared)
            scores = scored.scores.float().masked_fill(~scored.allowed, -torch.inf)
            best = scores.topk(min(wanted, scores.shape[-1]), -1)
            none = layout.n_blocks
            index = best.indices.masked_fill(best.values == -torch.inf, none).sort(-1).values
            index = index.masked_fill(index == none, -1).to(torch.int32)
            pieces.append(torch.nn.functional.pad(index, (0, width - index.shape[-1]), value=-1))
        else:
            pieces.append(torch.full(shape, -1, dtype=torch.int32, device=factors.k_BSI.device))
        tile = stop
    return torch.cat(pieces, 2)


def _layout(case: Case) -> TileLayout:
    n = case.q.shape[1]
    return tile_layout(case.spec, n, n, 0, None, case.q.device)


def indexer_record(
    shape: Shape, case: Case, budget_s: float = 1.0, exact: Case | None = None
) -> dict[str, Any]:
    """Scoring and selection of a whole sequence beside the torch.topk pipeline. exact: the case
    whose choice recall counts, where this one's keys are rounded."""
    device = case.q.device
    with torch.no_grad():
        selection = case.choose()
        plain = topk_blocks(case)
        recalled = {}
        if exact is not None:
            recalled["recall"] = recall(selection.blocks_BHQN, exact.choose().blocks_BHQN)
        score = milliseconds(case.score, device, budget_s)
        choose = milliseconds(case.choose, device, budget_s)
        topk = milliseconds(lambda: topk_blocks(case), device, budget_s)
        return {
            **shape.fields(),
            "pass": "select",
            **recalled,
            "score_ms": score,
            "select_ms": max(0.0, choose - score),
            "choose_ms": choose,
            "topk_ms": topk,
            "ratio": topk / choose,
            "overlap": recall(selection.blocks_BHQN, plain),
            "peak_extra_bytes": peak_bytes(case.choose, device),
            "topk_extra_bytes": peak_bytes(lambda: topk_blocks(case), device),
        }


def hierarchical_records(
    shape: Shape,
    case: Case,
    poolings: list[str],
    pools: list[int],
    survivors: list[int],
    budget_s: float = 0.5,
    exact: Case | None = None,
) -> list[dict[str, Any]]:
    """Recall against cost of coarse-to-fine selection, for each pooling, pool and number of
    survivors; of bounds (not taken of ReLU scores) also the share of tiles they prove exact, which
    takes in those that leave nothing out. exact: the case whose choice is recalled, if another."""
    wanted = (exact or case).choose()
    rows = []
    given = {f.name: getattr(case.factors, f.name) for f in fields(IndexFactors)}
    for pooling, pool, n in itertools.product(poolings, pools, survivors):
        bound = pooling == BOUND
        if pool % case.spec.key_block or (bound and case.factors.activation != "sigmoid"):
            continue  # pooling blocks hold whole key blocks
        if n * pool >= shape.seq_len + pool:
            continue  # everything survives with fewer, too
        factors = HierarchicalFactors(**given, pooling=pooling, pool=pool, survivors=n)
        blocks = case.spec.key_block if factors.block_score == "mean" else 1

        def choose(prove: bool = False, factors: IndexFactors = factors) -> Chosen:
            size = (case.budget, case.budget, case.q.shape[1])
            return select(factors, case.spec, *size, prove=prove)

        with torch.no_grad():
            found = choose(prove=bound)
            ms = milliseconds(choose, case.q.device, budget_s)
        row = {
            **shape.fields(),
            "pass": "hierarchical",
            "pooling": pooling,
            "pool": pool,
            "survivors": n,
            "nothing_left_out": _all_survive(case, pool, n),
            "recall": recall(found.selection.blocks_BHQN, wanted.blocks_BHQN),
            "choose_ms": ms,
            "scored": min(n * pool, shape.seq_len) // blocks
            + shape.seq_len // pool * (2 if bound else 1),
            "scored_exact": shape.seq_len // blocks,
        }
        if found.proven_BHQ is not None:
            row["proven"] = float(found.proven_BHQ.float().mean())
        rows.append(row)
    return rows


def _all_survive(case: Case, pool: int, survivors: int) -> float:
    """Share of the tiles that have candidates in no more pooling blocks than survive."""
    layout = _layout(case)
    pools = -(-layout.local_BQ // pool) - layout.sink_hi_BQ // pool
    return float((pools <= survivors).float().mean())


def objective_record(
    shape: Shape, case: Case, dense_rows: int, budget_s: float = 1.0
) -> dict[str, Any]:
    """Forward and backward of the KL objectives, beside those of the attention itself."""
    case = case.learn()
    device = case.q.device
    selection = case.choose()
    v = case.gated_values.detach().requires_grad_()
    dout = torch.randn_like(case.q)
    f = case.factors
    leaves = [f.q_BTJI, f.k_BSI, f.weight_BTJ]
    with torch.no_grad():
        mass = sparse_attention(
            case.q, case.k, v, selection, need_mass=True, impl=case.impl
        ).mass_BHQN
    assert mass is not None
    tiles = torch.linspace(0, selection.layout.n_tiles - 1, dense_rows, device=device).long()

    def attention(need_mass: bool) -> None:
        out = sparse_attention(
            case.q, case.k, v, selection, need_mass=need_mass, impl=case.impl
        ).out_BTHE
        torch.autograd.grad(out, (case.q, case.k, v), dout)

    def on_selected() -> None:
        loss = selected_kl(f, selection, mass, "log")
        torch.autograd.grad(loss, leaves, allow_unused=True)

    def on_all() -> None:
        loss = dense_kl(f, case.q.detach(), case.k.detach(), case.spec, tiles, None, "log")
        torch.autograd.grad(loss, leaves, allow_unused=True)

    attend = milliseconds(lambda: attention(False), device, budget_s)
    record = {
        **shape.fields(),
        "pass": "objective",
        "attend_ms": attend,
        "mass_ms": milliseconds(lambda: attention(True), device, budget_s) - attend,
        "selected_kl_ms": milliseconds(on_selected, device, budget_s),
        "dense_kl_ms": milliseconds(on_all, device, budget_s),
        "dense_rows": dense_rows,
        "peak_extra_bytes": peak_bytes(on_all, device),
    }
    record["selected_kl_share"] = record["selected_kl_ms"] / attend
    record["dense_kl_share"] = record["dense_kl_ms"] / attend
    return record
