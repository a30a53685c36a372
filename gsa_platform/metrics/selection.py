"""How many keys a selection attends, and how much of the dense attention it covers."""

import torch
from torch import Tensor

from gsa_platform.metrics.base import SumMetric, ratio


class SelectedKeys(SumMetric):
    """Keys attended per query, as a number and as a fraction of the causally visible keys."""

    is_differentiable = False
    keys: Tensor
    visible: Tensor
    queries: Tensor
    smallest: Tensor
    largest: Tensor

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        for name in ("keys", "visible", "queries"):
            self.add_sum(name, dtype=torch.int64)
        top = torch.iinfo(torch.int64).max
        self.add_state("smallest", torch.tensor(top), dist_reduce_fx="min")
        self.add_state("largest", torch.tensor(-1), dist_reduce_fx="max")

    def update(self, keys: Tensor, visible: Tensor) -> None:
        """Add queries.

        keys: integer keys attended by each query, any shape; visible: integer keys that causality
        lets it attend (itself included), broadcastable to `keys`.
        """
        if keys.numel() == 0:
            return
        self.keys += keys.sum(dtype=torch.int64)
        self.visible += visible.expand_as(keys).sum(dtype=torch.int64)
        self.queries += keys.numel()
        self.smallest = torch.minimum(self.smallest, keys.amin().long())
        self.largest = torch.maximum(self.largest, keys.amax().long())

    def compute(self) -> dict[str, Tensor]:
        """mean, min, max: keys per query; fraction: attended share of all causal pairs."""
        nan = torch.full_like(self.keys, float("nan"), dtype=torch.float64)
        some = self.queries > 0
        return {
            "mean": ratio(self.keys, self.queries),
            "fraction": ratio(self.keys, self.visible),
            "min": torch.where(some, self.smallest.double(), nan),
            "max": torch.where(some, self.largest.double(), nan),
        }


class SelectionRecall(SumMetric):
    """Share of the dense attention mass on the selected keys, and overlap with the dense top-k.

    Dense mass is computed on the same weights with the full softmax. Recall 1 means that the
    selection loses nothing.
    """

    is_differentiable = False
    higher_is_better = True
    covered: Tensor
    total: Tensor
    hits: Tensor
    wanted: Tensor

    def __init__(self, n_layers: int = 1, **kwargs: object) -> None:
        super().__init__(**kwargs)
        for name in ("covered", "total", "hits", "wanted"):
            self.add_sum(name, (n_layers,))

    def update(
        self,
        covered: Tensor | float,
        total: Tensor | float,
        hits: Tensor | float = 0,
        wanted: Tensor | float = 0,
        layer: int = 0,
    ) -> None:
        """Add queries of one layer, as sums.

        covered: dense attention mass on selected keys; total: all dense mass (the number of query
        rows, as each sums to 1); hits: selected keys among the dense top-k; wanted: sum of the k.
        """
        self.covered[layer] += covered
        self.total[layer] += total
        self.hits[layer] += hits
        self.wanted[layer] += wanted

    def compute(self) -> dict[str, Tensor]:
        """recall and overlap in [0, 1] over all layers, and per layer in `recall_layers` and
        `overlap_layers` [n_layers]; NaN where nothing was fed."""
        return {
            "recall": ratio(self.covered.sum(), self.total.sum()),
            "recall_layers": ratio(self.covered, self.total),
            "overlap": ratio(self.hits.sum(), self.wanted.sum()),
            "overlap_layers": ratio(self.hits, self.wanted),
        }
