"""A budget from the variance of a query's own index scores."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gsa_platform.contracts import LayerDims, Sequence, Sparsity

from ..configs import AdaptiveVarianceConfig

SIGNS = ("decreasing", "increasing")
FORMS = ("ratio", "logistic")
_TINY = 1e-12  # a variance below this says nothing about the scores


class AdaptiveVarianceBudget(Sparsity):
    """k_t from the variance V_t of a query's own candidate scores (arXiv 2601.15305, Eq. 8).

        form ratio     k_t = k r              with r = (V_t / Vbar)^(+-temperature)
        form logistic  k_t = k (0.5 + r / (1 + r)), between 0.5 k and 1.5 k

    clamped to [k_min, k_max]. The exponent is positive for sign=increasing (the printed formula)
    and negative for sign=decreasing (the paper's text and code: a flat score row means an
    undecided indexer, which gets more keys). Vbar is a running mean over past steps: a mean over
    the present batch would leak later tokens and other samples. Queries without candidates, and
    every query before the first step has been seen, get k.
    """

    statistics = ("count", "variance")
    mean_variance: Tensor

    def __init__(self, config: AdaptiveVarianceConfig, dims: LayerDims) -> None:
        super().__init__()
        if config.sign not in SIGNS:
            raise ValueError(f"sparsity.sign={config.sign!r}: choose {' or '.join(SIGNS)}")
        if config.form not in FORMS:
            raise ValueError(f"sparsity.form={config.form!r}: choose {' or '.join(FORMS)}")
        if not config.k_min <= config.k <= config.k_max:
            raise ValueError(
                f"sparsity: k_min={config.k_min} <= k={config.k} <= k_max={config.k_max} must hold"
            )
        self.window, self.sinks = config.window, config.sinks
        self.k, self.k_min, self.max_keys = config.k, config.k_min, config.k_max
        self.exponent = config.temperature * (1.0 if config.sign == "increasing" else -1.0)
        self.form, self.decay = config.form, config.decay
        self.register_buffer("mean_variance", torch.zeros((), dtype=torch.float64))

    def budget(self, seq: Sequence, spec: Any = None) -> Callable[[dict[str, Tensor]], Tensor]:
        return self.rule

    def rule(self, statistics: dict[str, Tensor]) -> Tensor:
        """Budgets in keys, same shape as the statistics."""
        variance = statistics["variance"].double()
        known = (statistics["count"] > 1) & (self.mean_variance > 0)
        ratio = (variance / self.mean_variance.clamp_min(_TINY)).clamp(1e-6, 1e6) ** self.exponent
        factor = ratio if self.form == "ratio" else 0.5 + ratio / (1 + ratio)
        keys = torch.where(known, self.k * factor, float(self.k))
        return keys.clamp(self.k_min, self.max_keys).long()

    @torch.no_grad()
    def observe(self, statistics: dict[str, Tensor]) -> None:
        """Fold one step's mean variance into the running mean, the same on every rank."""
        variance = statistics["variance"].double().reshape(1).to(self.mean_variance.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(variance)
            variance = variance / dist.get_world_size()
        variance = variance.squeeze(0)
        if not torch.isfinite(variance) or variance <= _TINY:
            return
        old = self.mean_variance
        new = variance if old == 0 else self.decay * old + (1 - self.decay) * variance
        self.mean_variance.copy_(new)
