"""Loss and gradient spikes: told when they happen, counted, and optionally the end of a run."""

import math
import statistics
from collections import deque
from typing import Any

import lightning as L

from gsa_platform.progress import say

from ..extensions import LossSpikesConfig

WATCHED = {"train/loss": "factor", "train/grad_norm": "gradient_factor"}


class LossSpikes(L.Callback):
    """After each optimizer step, compares loss and gradient norm with the median of the last
    `window` steps. Logs `train/spikes`, the number so far. Raises ValueError for settings that
    cannot work.

    A spike is left out of the medians, so that a plateau of them is not taken for the rule.
    """

    def __init__(self, settings: LossSpikesConfig, cfg: Any) -> None:
        if settings.window < 2 or min(settings.factor, settings.gradient_factor) <= 1:
            raise ValueError("window must be at least 2, the factors above 1")
        self.settings = settings
        self.recent = {name: deque[float](maxlen=settings.window) for name in WATCHED}
        self.spikes: list[tuple[int, str, float]] = []  # (step, what, value)
        self._step = 0

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step == self._step:
            return  # between two optimizer steps
        self._step = trainer.global_step
        found = {name: trainer.callback_metrics.get(name) for name in WATCHED}
        for name, value in found.items():
            if value is not None:
                self.look(name, float(value), trainer)
        module.log("train/spikes", float(len(self.spikes)))

    def look(self, name: str, value: float, trainer: L.Trainer) -> None:
        """Take in one value of one step, and tell if it is a spike."""
        recent = self.recent[name]
        factor = getattr(self.settings, WATCHED[name])
        usual = statistics.median(recent) if len(recent) > 1 else None
        finite = math.isfinite(value)
        if finite and (usual is None or value <= factor * usual):
            recent.append(value)
            return
        self.spikes.append((self._step, name, value))
        if trainer.is_global_zero:
            than = "" if usual is None else f", median of the last {len(recent)} steps {usual:.4g}"
            say(f"spike   step {self._step}: {name} {value:.4g}{than}")
        if not finite and self.settings.stop:
            trainer.should_stop = True
