"""Records of scoring, selection and the indexer's objective.

topk_ms is the plain way over the same scores: torch.topk and a sort. Single keys of long rows are
chosen as they are scored: select_ms then holds both. A coarse-to-fine indexer, or one of rounded
keys, is measured against the exact choice of the same factors: recall is the share of the exact
blocks that it found, mass the share of the dense attention on the candidates that its own choice
covers (at some evenly spaced query tiles), mass_exact that of the exact choice, mass_best that of
the best choice there is, mass_chance that of as many blocks at random. The cost is its time, and
`cost`, the scores computed for the mean tile as a share of the exact indexer's (a bound is a
product of twice the width and counts as two).
"""

import itertools
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from gsa_kernels.attention_mass import probe
from gsa_kernels.index_score.api import BOUND, HierarchicalFactors, IndexFactors
from gsa_kernels.indexer_loss.api import dense_kl, selected_kl
from gsa_kernels.select import select
from gsa_kernels.select.api import Chosen
from gsa_kernels.selection import Selection, TileLayout, tile_layout
from gsa_kernels.sparse_attention import sparse_attention

from .case import Case, Shape
from .timing import milliseconds, peak_bytes
from .verify import recall


def topk_blocks(case: Case) -> Tensor:
    """[B, H, Q, N] blocks by torch.topk of the streamed scores, ascending, -1 at the end."""
    factors, spec = case.factors, case.spec
    layout = _layout(case)
    width = spec.max_blocks(case.budget, case.k.shape[1])
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
    q_start, device = case.factors.q_start, case.q.device
    return tile_layout(case.spec, case.q.shape[1], case.k.shape[1], q_start, None, device)


def masses(case: Case, selection: Selection, rows: int) -> dict[str, float]:
    """Dense attention that a selection covers, at `rows` evenly spaced query tiles, as a share of
    that on the candidates: `mass`, and of as many blocks `mass_best`, the most there is, and
    `mass_chance`, what random ones cover. Empty where every tile keeps all of its candidates."""
    layout = selection.layout
    last = layout.n_tiles - 1
    tiles = sorted({round(i * last / max(1, rows - 1)) for i in range(rows)})
    seen = probe(case.q, case.k, layout, tiles, selection)
    possible = float(seen.possible.sum())
    if not possible:
        return {}
    keys = (layout.local_BQ - layout.sink_hi_BQ)[:, None, tiles] / case.spec.key_block
    share = selection.counts_BHQ[:, :, tiles] / keys.clamp_min(1)
    share = share.movedim(-1, 0)
    chance = share[(share > 0) & (share < 1)]  # the tiles that `probe` tells of, in its order
    return {
        "mass": float(seen.got.sum()) / possible,
        "mass_best": float(seen.best.sum()) / possible,
        "mass_chance": float((seen.possible * chance).sum()) / possible,
    }


def _ceiling(case: Case, wanted: Selection, rows: int) -> dict[str, float]:
    """What the exact choice covers, and what any choice of as many blocks can."""
    found = masses(case, wanted, rows)
    return {"mass_exact": found.pop("mass"), **found} if found else {}


def indexer_record(
    shape: Shape,
    case: Case,
    budget_s: float = 1.0,
    exact: Case | None = None,
    mass_rows: int = 64,
) -> dict[str, Any]:
    """Scoring and selection of all queries beside the torch.topk pipeline. exact: the case whose
    choice recall counts, where this one's keys are rounded."""
    device = case.q.device
    with torch.no_grad():
        selection = case.choose()
        plain = topk_blocks(case)
        wanted = selection if exact is None else exact.choose()
        recalled = masses(case, selection, mass_rows) | _ceiling(case, wanted, mass_rows)
        if exact is not None:
            recalled["recall"] = recall(selection.blocks_BHQN, wanted.blocks_BHQN)
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
    sizes: list[tuple[int, int]],
    budget_s: float = 0.5,
    exact: Case | None = None,
    mass_rows: int = 64,
) -> list[dict[str, Any]]:
    """Recall against cost of coarse-to-fine selection, for each pooling and (pool, number of
    survivors); of bounds (not taken of ReLU scores) also the share of tiles they prove exact,
    which takes in those that leave nothing out. exact: the case whose choice is recalled, if
    another. Queries that follow a cache find the pooled keys of its whole blocks there."""
    wanted = (exact or case).choose()
    ceiling = _ceiling(case, wanted, mass_rows)
    rows = []
    given = {f.name: getattr(case.factors, f.name) for f in fields(IndexFactors)}
    for pooling, (pool, n) in itertools.product(poolings, sizes):
        bound = pooling == BOUND
        if pool % case.spec.key_block or (bound and case.factors.activation != "sigmoid"):
            continue  # pooling blocks hold whole key blocks
        if n * pool >= shape.seq_len + pool:
            continue  # everything survives with fewer, too
        factors = HierarchicalFactors(**given, pooling=pooling, pool=pool, survivors=n)
        if factors.q_start:
            factors = factors.remember(_Kept())

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
            **_coarse_cost(case, factors),
            "recall": recall(found.selection.blocks_BHQN, wanted.blocks_BHQN),
            **masses(case, found.selection, mass_rows),
            **ceiling,
            "choose_ms": ms,
        }
        if found.proven_BHQ is not None:
            row["proven"] = float(found.proven_BHQ.float().mean())
        rows.append(row)
    return rows


@dataclass
class _Kept:
    """What a decoding cache keeps of pooled keys, for calls that add no key."""

    index_pooled_BMI: Tensor | None = None

    def extend(self, name: str, new: Tensor) -> Tensor:
        assert self.index_pooled_BMI is None
        setattr(self, name, new)
        return new


def _coarse_cost(case: Case, factors: HierarchicalFactors) -> dict[str, float]:
    """nothing_left_out: the share of the tiles that have candidates in no more pooling blocks than
    survive. cost: scores of pooling blocks and inside the survivors, of those of all blocks."""
    layout, pool, kept = _layout(case), factors.pool, factors.survivors
    keys = (layout.local_BQ - layout.sink_hi_BQ).clamp_min(0)
    pools = (-(-layout.local_BQ // pool) - layout.sink_hi_BQ // pool).clamp_min(0)
    unit = case.spec.key_block if factors.block_score == "mean" else 1
    fine = torch.minimum(pools.clamp_max(kept) * pool, keys) / unit
    coarse = pools * (2 if factors.bounded else 1)
    return {
        "nothing_left_out": float((pools <= kept).float().mean()),
        "cost": float((coarse + fine).sum() / (keys / unit).sum().clamp_min(1e-9)),
    }


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
    # The mass is made for this objective alone.
    selected = record["selected_kl_ms"] + max(0.0, record["mass_ms"])
    record["selected_kl_share"] = selected / attend
    record["dense_kl_share"] = record["dense_kl_ms"] / attend
    return record
