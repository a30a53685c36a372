"""How far open the value gate and the output gate are."""

import torch
from torch import Tensor

from gsa_platform.metrics.base import SumMetric, ratio

SMALL = 0.1  # a gate below this value counts as closed


class GateMean(SumMetric):
    """Mean size of the gates' multipliers and the share of sizes below 0.1, per layer and overall.

    The size of a multiplier g is |g|: a gate that may turn negative (SiLU) and averages 0 is not
    closed. For a sigmoid gate it is the gate itself.
    """

    is_differentiable = False
    value_sum: Tensor
    value_small: Tensor
    value_count: Tensor
    output_sum: Tensor
    output_small: Tensor
    output_count: Tensor

    def __init__(self, n_layers: int = 1, **kwargs: object) -> None:
        super().__init__(**kwargs)
        for gate in ("value", "output"):
            self.add_sum(f"{gate}_sum", (n_layers,))
            self.add_sum(f"{gate}_small", (n_layers,), torch.int64)
            self.add_sum(f"{gate}_count", (n_layers,), torch.int64)

    def update(
        self, value: Tensor | None = None, output: Tensor | None = None, layer: int = 0
    ) -> None:
        """Add multipliers (any shape) of one layer; None: no such gate."""
        for gate, values in (("value", value), ("output", output)):
            if values is not None:
                values = values.detach().abs()
                getattr(self, f"{gate}_sum")[layer] += values.sum(dtype=torch.float64)
                getattr(self, f"{gate}_small")[layer] += (values < SMALL).sum()
                getattr(self, f"{gate}_count")[layer] += values.numel()

    def compute(self) -> dict[str, Tensor]:
        """For each gate that was fed: `value_mean`, `value_small` (share below 0.1) and
        `value_mean_layers` [n_layers]; the same names with `output`."""
        result: dict[str, Tensor] = {}
        for gate in ("value", "output"):
            total, small, count = (getattr(self, f"{gate}_{s}") for s in ("sum", "small", "count"))
            if count.sum() > 0:
                result[f"{gate}_mean"] = ratio(total.sum(), count.sum())
                result[f"{gate}_small"] = ratio(small.sum(), count.sum())
                result[f"{gate}_mean_layers"] = ratio(total, count)
        return result
