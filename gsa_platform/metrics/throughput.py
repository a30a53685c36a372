"""Training throughput over all devices and the share of the hardware's peak that it reaches."""

import torch
from torch import Tensor

from gsa_platform.metrics.base import SumMetric, ratio


def model_flops_utilisation(
    tokens_per_s: float, flops_per_token: float, peak_flops: float | None, devices: int = 1
) -> float | None:
    """MFU in [0, 1]: useful FLOP/s over peak FLOP/s of all devices; None if the peak is unknown.

    flops_per_token: training FLOPs (forward and backward) without recomputation.
    """
    if peak_flops is None:
        return None
    return tokens_per_s * flops_per_token / (peak_flops * devices)


class Throughput(SumMetric):
    """Tokens per second of the whole job.

    Ranks work at the same time: tokens are summed over ranks, and the slowest rank's time counts.
    """

    is_differentiable = False
    higher_is_better = True
    # The time's reduction (maximum over ranks) is not how batches are merged (their sum).
    full_state_update = True
    tokens: Tensor
    seconds: Tensor

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.add_sum("tokens", dtype=torch.int64)
        self.add_state("seconds", torch.zeros((), dtype=torch.float64), dist_reduce_fx="max")

    def update(self, tokens: Tensor | int, seconds: Tensor | float) -> None:
        """Add `tokens` processed by this rank in `seconds` of wall time."""
        self.tokens += tokens
        self.seconds += seconds

    def compute(self) -> Tensor:
        """Tokens per second, float64 scalar; NaN before the first update."""
        return ratio(self.tokens, self.seconds)

    def mfu(
        self, flops_per_token: float, peak_flops: float | None, devices: int = 1
    ) -> float | None:
        """Model FLOPs utilisation at this rate; see `model_flops_utilisation`."""
        return model_flops_utilisation(float(self.compute()), flops_per_token, peak_flops, devices)
