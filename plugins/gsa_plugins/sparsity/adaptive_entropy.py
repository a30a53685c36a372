"""A budget from the entropy of a query's own index scores."""

from torch import Tensor

from gsa_platform.contracts import LayerDims

from ..configs import AdaptiveEntropyConfig
from .running import RunningRatioBudget


class AdaptiveEntropyBudget(RunningRatioBudget):
    """k_t from how far the entropy of the candidate scores lies below that of equal scores.

    With p = score / sum(score) over n candidates the statistic is log n - H(p), in nats, over its
    running mean. sign=increasing gives more keys at high entropy (an undecided indexer),
    sign=decreasing fewer. The public code of arXiv 2601.15305 has k (0.5 + H / log(n + 1))
    instead; H / log n is near 1 wherever scores are bounded sigmoids, so the distance from its
    largest value is what tells queries apart.
    """

    statistics = ("count", "entropy")
    running = "mean_gap"

    def __init__(self, config: AdaptiveEntropyConfig, dims: LayerDims) -> None:
        super().__init__(config, -1.0 if config.sign == "increasing" else 1.0)

    def statistic(self, statistics: dict[str, Tensor]) -> Tensor:
        return -statistics["entropy"]
