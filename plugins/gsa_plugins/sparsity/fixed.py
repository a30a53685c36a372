"""The same budget for every query."""

from typing import Any

from gsa_platform.contracts import LayerDims, Sequence, Sparsity

from ..configs import FixedBudgetConfig


class FixedBudget(Sparsity):
    """k keys for every query."""

    def __init__(self, config: FixedBudgetConfig, dims: LayerDims) -> None:
        super().__init__()
        self.window, self.sinks = config.window, config.sinks
        self.max_keys = config.k

    def budget(self, seq: Sequence, spec: Any = None) -> int:
        return self.max_keys
