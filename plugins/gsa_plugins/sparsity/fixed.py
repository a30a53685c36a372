"""The same budget for every query."""

from gsa_platform.contracts import LayerDims, Sparsity

from ..configs import FixedBudgetConfig


class FixedBudget(Sparsity):
    """k keys for every query."""

    def __init__(self, config: FixedBudgetConfig, dims: LayerDims) -> None:
        super().__init__()
        self.window, self.sinks = config.window, config.sinks
        self.max_keys = config.k

    def budget(self) -> int:
        return self.max_keys
