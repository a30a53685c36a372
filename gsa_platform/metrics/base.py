"""Base class of the running sums: states keep their dtype whatever precision the model has."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class SumMetric(Metric):
    """Metric whose states are float64 or int64 sums.

    `model.to(dtype=torch.bfloat16)` (what bf16-true training does) would round the states of any
    metric below the model to three digits, so only the device of such a call is followed.
    """

    full_state_update = False

    def add_sum(
        self, name: str, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float64
    ) -> None:
        """Add a state `name` that starts at zero and is summed over ranks."""
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> Any:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor).device)

        return super()._apply(move, exclude_state)


def ratio(total: Tensor, count: Tensor) -> Tensor:
    """total / count in float64; NaN where nothing was counted."""
    return total.double() / count.double()


def largest(layers: Tensor) -> Tensor:
    """Largest of the numbers that are not NaN; NaN if all are."""
    return torch.where(layers.isnan().all(), torch.nan, layers.nan_to_num(-torch.inf).amax())
