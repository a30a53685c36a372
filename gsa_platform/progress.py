"""Progress on the terminal: a bar where there is one, plain lines where output is a file."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L


def say(text: str) -> None:
    """Print a line at once, also through a pipe."""
    print(text, flush=True)


def progress_callback(steps: int) -> L.Callback:
    """A tqdm bar on a terminal, otherwise one line for every twentieth of the steps."""
    if sys.stderr.isatty() or sys.stdout.isatty():
        return L.pytorch.callbacks.TQDMProgressBar(leave=True)
    return ProgressLines(max(1, steps // 20))


class ProgressLines(L.pytorch.callbacks.ProgressBar):
    """`step 12/20  loss 3.2145  48,211 tokens/s  left 1:05` every few steps."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every, self.enabled = every, True
        self.began: float | None = None
        self.first = 0

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.began, self.first = time.perf_counter(), trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_args: Any
    ) -> None:
        step, steps = trainer.global_step, trainer.max_steps
        due = step % self.every == 0 or step == steps
        if not self.enabled or not due or trainer.fit_loop._should_accumulate():
            return
        assert self.began is not None
        rate = (time.perf_counter() - self.began) / max(1, step - self.first)
        minutes, seconds = divmod(round(rate * (steps - step)), 60)
        values = trainer.progress_bar_metrics
        shown = [f"step {step}/{steps}"]
        if "train/loss" in values:
            shown.append(f"loss {float(values['train/loss']):.4f}")
        if "perf/tokens_per_s" in values:
            shown.append(f"{float(values['perf/tokens_per_s']):,.0f} tokens/s")
        shown.append(f"left {minutes}:{seconds:02d}")
        say("  ".join(shown))
