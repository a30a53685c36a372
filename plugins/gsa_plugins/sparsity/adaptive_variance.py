"""A budget from the variance of a query's own index scores."""

from torch import Tensor

from gsa_platform.contracts import LayerDims

from ..configs import AdaptiveVarianceConfig
from .running import RunningRatioBudget


class AdaptiveVarianceBudget(RunningRatioBudget):
    """k_t from the variance of the candidate scores (arXiv 2601.15305, Eq. 8).

    sign=increasing is the printed formula; sign=decreasing the paper's text and code: a flat
    score row means an undecided indexer, which gets more keys.
    """

    statistics = ("count", "variance")
    running = "mean_variance"

    def __init__(self, config: AdaptiveVarianceConfig, dims: LayerDims) -> None:
        super().__init__(config, 1.0 if config.sign == "increasing" else -1.0)

    def statistic(self, statistics: dict[str, Tensor]) -> Tensor:
        return statistics["variance"]
