"""Mean of any number that layers report."""

import torch
from torch import Tensor

from gsa_platform.metrics.base import SumMetric, largest, ratio


class LayerMean(SumMetric):
    """Mean of all values, and that of the layer where it is largest."""

    is_differentiable = False
    total: Tensor
    count: Tensor

    def __init__(self, n_layers: int = 1, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.add_sum("total", (n_layers,))
        self.add_sum("count", (n_layers,), torch.int64)

    def update(self, values: Tensor, layer: int = 0) -> None:
        """Add values (any shape) of one layer."""
        self.total[layer] += values.detach().sum(dtype=torch.float64)
        self.count[layer] += values.numel()

    def compute(self) -> dict[str, Tensor]:
        """mean and max (over the layers that were fed), NaN if none was."""
        return {
            "mean": ratio(self.total.sum(), self.count.sum()),
            "max": largest(ratio(self.total, self.count)),
        }
