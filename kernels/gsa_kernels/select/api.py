"""select(): from index factors and a budget to a Selection, never holding a T x S matrix.

The keys of a tile are its top candidates by block score at the tile's anchor. Scores are compared
to 12 bits (`comparable`); ties go to the lowest position. Blocks inside the local window or the
sinks are never candidates: they are attended anyway and are paid from the budget first.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gsa_kernels.index_score.api import BlockScores
from gsa_kernels.selection import Selection, SelectionSpec
from gsa_kernels.topk import comparable

from .statistics import STATISTICS, check_names

__all__ = ["BudgetRule", "Chosen", "STATISTICS", "comparable", "select"]

# From the statistics of each tile's anchor (see statistics.py) to budgets in keys.
BudgetRule = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Chosen:
    """A selection and the statistics it was made from, each [B, H, Q] (a histogram has one more
    dimension); 0 at a tile that a previous call has begun."""

    selection: Selection
    statistics: dict[str, Tensor]


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
) -> Chosen:
    """Choose the keys of queries q_start .. q_start + n_queries - 1 (q_start from the factors).

    budget: keys a query may attend in all (window and sinks included), or a rule that maps the
    statistics named (each [B, H, Q]; count is always there) to such budgets, at most max_keys.
    previous: the unfinished tile of the last call (`Selection.tail`), needed when q_start lies
    inside a tile. Raises ValueError for an unknown statistic, and when q_start lies inside a tile
    and previous does not end there.
    """
    from . import eager, reference

    if factors.q_start % spec.query_tile:
        if previous is None or previous.q_start + previous.n_queries != factors.q_start:
            raise ValueError(
                f"queries start at {factors.q_start}, inside a tile of {spec.query_tile}: the "
                "unfinished tile of the previous call is needed"
            )
    if impl not in ("auto", "eager", "reference"):
        raise ValueError(f"select has implementations auto, eager and reference, not {impl!r}")
    names = check_names(statistics)
    if callable(budget) or names:
        names = check_names((*names, "count"))
    run = reference.select if impl == "reference" else eager.select
    return run(factors, spec, budget, max_keys, n_queries, doc_start_BS, previous, names)
