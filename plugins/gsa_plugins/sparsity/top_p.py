"""The smallest budget that holds a share of a query's index scores."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gsa_kernels.select.statistics import bin_values
from gsa_platform.contracts import LayerDims, Sequence, Sparsity

from ..configs import TopPConfig


class TopPBudget(Sparsity):
    """As many of the best candidates as hold `p` of the summed scores, between k_min and k_max.

    Nucleus sampling's rule (Holtzman et al. 2019, arXiv 1904.09751) on index scores, as Twilight
    (arXiv 2502.02770) has it on attention weights. Read off the histogram of the scores, where a
    score counts as the centre of its bin, 6 % around it. Raises ValueError for p outside (0, 1]
    and k_min above k_max.
    """

    statistics = ("count", "histogram")

    def __init__(self, config: TopPConfig, dims: LayerDims) -> None:
        super().__init__()
        if not 0 < config.p <= 1:
            raise ValueError(f"sparsity.p={config.p} must be above 0 and at most 1")
        if config.k_min > config.k_max:
            raise ValueError(f"sparsity.k_min={config.k_min} is above k_max={config.k_max}")
        self.window, self.sinks = config.window, config.sinks
        self.p, self.k_min, self.max_keys = config.p, config.k_min, config.k_max

    def budget(self, seq: Sequence, spec: Any = None) -> Callable[[dict[str, Tensor]], Tensor]:
        return functools.partial(self.rule, spec=spec)

    def rule(self, statistics: dict[str, Tensor], spec: Any = None) -> Tensor:
        """Budgets in keys [B, H, Q]: the forced ones and the blocks chosen."""
        block, sinks = (1, self.sinks) if spec is None else (spec.key_block, spec.sink_keys)
        keys = self.blocks(statistics["histogram"]) * block + self.window + sinks
        return keys.clamp(self.k_min, self.max_keys)

    def blocks(self, histogram: Tensor) -> Tensor:
        """[...] fewest candidates, best first, with p of the sum of histogram [..., bins]."""
        count = histogram.double().flip(-1)
        value = bin_values(histogram.device).flip(-1)
        before = count.cumsum(-1) - count
        mass = (count * value).cumsum(-1)
        wanted = self.p * mass[..., -1:]
        # The first bin with which the share is reached, and how many of its candidates it takes.
        at = (mass < wanted * (1 - 1e-12)).sum(-1, keepdim=True).clamp_max(len(value) - 1)
        missing = wanted - (mass.gather(-1, at) - count.gather(-1, at) * value[at])
        part = torch.ceil(missing / value[at].clamp_min(1e-30) - 1e-9).clamp_min(0)
        part = torch.minimum(part, count.gather(-1, at))
        found = (before.gather(-1, at) + part).squeeze(-1)
        return found.masked_fill(mass[..., -1] <= 0, 0).long()
