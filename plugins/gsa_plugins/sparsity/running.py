"""Budgets that follow how a query's statistic compares with its running mean."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from gsa_platform.contracts import Sequence, Sparsity, undefined

SIGNS = ("decreasing", "increasing")
FORMS = ("ratio", "logistic")
_TINY = 1e-12  # a statistic below this says nothing about the scores


class RunningConfig(Protocol):
    k: int
    k_min: int
    k_max: int
    window: int
    sinks: int
    sign: str
    form: str
    temperature: float
    decay: float


class RunningRatioBudget(Sparsity):
    """k_t from a statistic s_t >= 0 of a query's own candidate scores, with a running mean m of it

        form ratio     k_t = k r                     r = (s_t / m)^exponent
        form logistic  k_t = k (0.5 + r / (1 + r)),  between 0.5 k and 1.5 k

    clamped to [k_min, k_max]. m is a mean over past steps: a mean over the present batch would
    leak later tokens and other samples. Queries without two candidates, and every query before
    the first step has been seen, get k. Raises ValueError for a sign or form that does not exist
    and for k outside its bounds.
    """

    running: str  # name of the buffer that holds m

    def __init__(self, config: RunningConfig, exponent: float) -> None:
        """exponent: sign of the response of k to s; its strength is config.temperature."""
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
        self.exponent = config.temperature * exponent
        self.form, self.decay = config.form, config.decay
        self.register_buffer(self.running, torch.zeros((), dtype=torch.float64))

    @property
    def mean(self) -> Tensor:
        return self.get_buffer(self.running)

    def statistic(self, statistics: dict[str, Tensor]) -> Tensor:
        """s >= 0, of queries or of a step's means."""
        raise undefined(self, "statistic")

    def budget(self, seq: Sequence, spec: Any = None) -> Callable[[dict[str, Tensor]], Tensor]:
        return self.rule

    def rule(self, statistics: dict[str, Tensor]) -> Tensor:
        """Budgets in keys, same shape as the statistics."""
        value = self.statistic(statistics).double()
        known = (statistics["count"] > 1) & (self.mean > 0)
        ratio = (value / self.mean.clamp_min(_TINY)).clamp(1e-6, 1e6) ** self.exponent
        factor = ratio if self.form == "ratio" else 0.5 + ratio / (1 + ratio)
        keys = torch.where(known, self.k * factor, float(self.k))
        return keys.clamp(self.k_min, self.max_keys).long()

    @torch.no_grad()
    def observe(self, statistics: dict[str, Tensor]) -> None:
        """Fold one step's mean into the running mean, the same on every rank."""
        value = self.statistic(statistics).double().reshape(1).to(self.mean.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(value)
            value = value / dist.get_world_size()
        value = value.squeeze(0)
        if not torch.isfinite(value) or value <= _TINY:
            return
        old = self.mean
        new = value if old == 0 else self.decay * old + (1 - self.decay) * value
        self.mean.copy_(new)
