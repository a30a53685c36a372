"""select(): from index factors and a budget to a Selection, never holding a T x S matrix.

The keys of a tile are its top candidates by block score at the tile's anchor. Scores are compared
to 12 bits (`comparable`); ties go to the lowest position. Blocks inside the local window or the
sinks are never candidates: they are attended anyway and are paid from the budget first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gsa_kernels.dispatch import resolve, triton_reason
from gsa_kernels.index_score.api import BlockScores, HierarchicalFactors, IndexFactors
from gsa_kernels.selection import Selection, SelectionSpec, tile_layout
from gsa_kernels.topk import comparable

from .statistics import STATISTICS, check_names

if TYPE_CHECKING:
    from . import chunked

__all__ = ["BudgetRule", "Chosen", "STATISTICS", "comparable", "select"]

# From the statistics of each tile's anchor (see statistics.py) to budgets in keys.
BudgetRule = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Chosen:
    """A selection and the statistics it was made from, each [B, H, Q] (a histogram has one more
    dimension); 0 at a tile that a previous call has begun. proven_BHQ: whether each tile's choice
    is known to be that of the exact scores, false at a tile that a previous call has begun."""

    selection: Selection
    statistics: dict[str, Tensor]
    proven_BHQ: Tensor | None = None


@torch.no_grad()
def select(
    factors: BlockScores,
    spec: SelectionSpec,
    budget: int | BudgetRule,
    max_keys: int,
    n_queries: int,
    doc_start_BS: Tensor | None = None,
    previous: Selection | None = None,
    statistics: tuple[str, ...] = (),
    impl: str = "auto",
    prove: bool = False,
) -> Chosen:
    """Choose the keys of queries q_start .. q_start + n_queries - 1 (q_start from the factors).

    budget: keys a query may attend in all (window and sinks included), or a rule that maps the
    statistics named (each [B, H, Q]; count is always there) to such budgets, at most max_keys.
    previous: the unfinished tile of the last call (`Selection.tail`), needed when q_start lies
    inside a tile. impl: triton (the default on CUDA: scores of IndexFactors and
    HierarchicalFactors and the top-k of any scores in kernels), eager or reference. prove: also
    tell of each tile whether its blocks are those that scores of all blocks would choose: true
    where as many scores as are chosen lie above the bound of everything left out, as selection
    compares them. It costs a pass over the scores and needs factors of pooling "bound".
    Raises ValueError for an unknown statistic, a proof without bounds, fewer queries in the
    factors, when q_start lies inside a tile and previous does not end there, when impl cannot run,
    and on NaN scores (a CUDA device asserts).
    """
    from . import chunked, reference

    if n_queries > factors.n_queries:
        raise ValueError(f"the factors hold {factors.n_queries} queries, not {n_queries}")
    if factors.q_start % spec.query_tile:
        if previous is None or previous.q_start + previous.n_queries != factors.q_start:
            raise ValueError(
                f"queries start at {factors.q_start}, inside a tile of {spec.query_tile}: the "
                "unfinished tile of the previous call is needed"
            )
    if prove and not (isinstance(factors, HierarchicalFactors) and factors.bounded):
        raise ValueError("a proof needs bounds: coarse-to-fine factors of pooling 'bound'")
    names = check_names(statistics)
    if callable(budget) or names:
        names = check_names((*names, "count"))
    name, _ = choose(impl, factors, spec, max_keys)
    if name == "reference":
        return reference.select(
            factors, spec, budget, max_keys, n_queries, doc_start_BS, previous, names, prove
        )
    width = spec.max_blocks(max_keys, factors.k_BSI.shape[1])
    rows = _rows(name, factors, spec, n_queries, doc_start_BS, names, prove, width)
    return chunked.run(
        rows, factors, spec, budget, max_keys, n_queries, doc_start_BS, previous, names, prove
    )


def choose(
    impl: str,
    factors: BlockScores,
    spec: SelectionSpec,
    max_keys: int,
    device: torch.device | None = None,
) -> tuple[str, str]:
    """(implementation, reason) for a request; ValueError if the one named cannot run.

    device: where it would run, if not where the factors are (which may be meta tensors).
    """
    from . import kernels

    device = device or factors.k_BSI.device
    width = spec.max_blocks(max_keys, factors.k_BSI.shape[1])
    reason = triton_reason(device, interpreted=impl == "triton")
    available = {
        "triton": reason or kernels.no_kernel(factors, spec, width),
        "eager": "",
        "reference": "",
    }
    name = resolve("selection", impl, device, available)
    if impl != "auto":
        return name, "asked for"
    if name == "eager":
        return name, f"PyTorch, because {available['triton']}"
    if not kernels.scores_in_kernel(factors):
        return name, f"of the choice; {type(factors).__name__} are computed by PyTorch"
    return name, "the fastest here"


def _rows(
    name: str,
    factors: BlockScores,
    spec: SelectionSpec,
    n_queries: int,
    doc_start_BS: Tensor | None,
    names: tuple[str, ...] = (),
    prove: bool = False,
    width: int = 0,
) -> "chunked.Rows":
    """names, width: as FactorRows'."""
    from . import eager, kernels

    fused = name == "triton" and kernels.scores_in_kernel(factors)
    layout = None
    if names or prove or not fused:  # many small tensors
        n_keys, device = factors.k_BSI.shape[1], factors.k_BSI.device
        layout = tile_layout(spec, n_queries, n_keys, factors.q_start, doc_start_BS, device)
    if fused:
        assert isinstance(factors, IndexFactors)
        if isinstance(factors, HierarchicalFactors):
            return kernels.CoarseRows(factors, spec, layout, doc_start_BS)
        return kernels.FactorRows(factors, spec, layout, doc_start_BS, width, names)
    assert layout is not None
    rows = kernels.KernelRows if name == "triton" else eager.EagerRows
    return rows(factors, layout, doc_start_BS)
