"""select(): from index factors and a budget to a Selection, never holding a T x S matrix.

The keys of a tile are its top candidates by block score at the tile's anchor. Scores are compared
to 12 bits (`comparable`); ties go to the lowest position. Blocks inside the local window or the
sinks are never candidates: they are attended anyway and are paid from the budget first.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gsa_kernels.index_score.api import IndexFactors
from gsa_kernels.selection import Selection, SelectionSpec

# What a budget rule may read about the candidate scores of each tile's anchor, each [B, H, Q].
STATISTICS = ("count", "mean", "variance")
BudgetRule = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Chosen:
    """A selection and the streaming statistics it was made from (empty when none were asked)."""

    selection: Selection
    statistics: dict[str, Tensor]


def comparable(scores: Tensor) -> Tensor:
    """Scores as selection compares them: float32 rounded to 12 significant bits (0.02 %).

    Two equal keys (a repeated token in the first layer) have equal scores only up to rounding,
    which differs with the shape of a matrix product: unrounded, decoding one token at a time would
    choose another of them than one pass over the sequence does.
    """
    bits = scores.float().contiguous().view(torch.int32)
    return ((bits + (1 << 11)) & ~((1 << 12) - 1)).view(torch.float32)


@torch.no_grad()
def select(
    factors: IndexFactors,
    spec: SelectionSpec,
    budget: int | BudgetRule,
    max_keys: int,
    n_queries: int,
    doc_start_BS: Tensor | None = None,
    previous: Selection | None = None,
    statistics: bool = False,
    impl: str = "auto",
) -> Chosen:
    """Choose the keys of queries q_start .. q_start + n_queries - 1 (q_start from the factors).

    budget: keys a query may attend in all (window and sinks included), or a rule that maps the
    statistics (each [B, H, Q]) to such budgets, at most max_keys. previous: the unfinished tile of
    the last call (`Selection.tail`), needed when q_start lies inside a tile.
    Raises ValueError when q_start lies inside a tile and previous does not end there.
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
    run = reference.select if impl == "reference" else eager.select
    return run(factors, spec, budget, max_keys, n_queries, doc_start_BS, previous, statistics)
