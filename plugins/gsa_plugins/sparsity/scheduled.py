"""A budget that shrinks over training, from (nearly) dense to sparse."""

import math
from typing import Any

from gsa_platform.contracts import LayerDims, Sequence, Sparsity

from ..configs import ScheduledBudgetConfig

SHAPES = ("linear", "cosine")


class ScheduledBudget(Sparsity):
    """k_start keys at step 0, k keys from `steps` on; k whenever the model is not training.

    Evaluation and decoding always use the final k: that is the model that will be used, and a
    decoder knows no training step. Lists are as long as the budget, so a k_start of the whole
    context (0) belongs to block or tile modes, or to short contexts. Attention that gets sparse
    gradually: cubic pruning schedules (Zhu and Gupta 2017, arXiv 1710.01878) and the dense
    warm-up of DeepSeek-V3.2. Raises ValueError for an unknown shape, steps below 1, k_start
    below k.
    """

    def __init__(self, config: ScheduledBudgetConfig, dims: LayerDims) -> None:
        super().__init__()
        if config.shape not in SHAPES:
            raise ValueError(f"sparsity.shape={config.shape!r}: choose {' or '.join(SHAPES)}")
        if config.steps < 1:
            raise ValueError(f"sparsity.steps={config.steps} must be at least 1")
        if config.k_start and config.k_start < config.k:
            raise ValueError(
                f"sparsity.k_start={config.k_start} is below sparsity.k={config.k}: a schedule "
                "goes from dense to sparse (0 starts with the whole context)"
            )
        self.window, self.sinks = config.window, config.sinks
        self.k, self.steps, self.shape = config.k, config.steps, config.shape
        self.max_keys = max(config.k, config.k_start or dims.context)

    def budget(self, seq: Sequence, spec: Any = None) -> int:
        if not self.training or seq.step >= self.steps:
            return self.k
        done = seq.step / self.steps
        if self.shape == "cosine":
            done = 0.5 - 0.5 * math.cos(math.pi * done)
        return round(self.max_keys + done * (self.k - self.max_keys))
