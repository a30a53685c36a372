"""Evaluation tasks: what `eval task=NAME` measures of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EvalRun:
    """A checkpoint that is loaded and ready.

    cfg: its configuration with what was typed; module: the LanguageModel on `device`, in
    evaluation mode; data: its data module, prepared.
    """

    checkpoint: str
    cfg: Any
    module: Any
    data: Any
    device: Any


class EvalTask:
    """Base of evaluation tasks; built without arguments."""

    def evaluate(self, run: EvalRun) -> dict[str, Any]:
        """Numbers, texts and lists of them, for eval.json. Raises UserError if there is nothing to
        evaluate."""
        raise NotImplementedError(f"{type(self).__name__} does not define evaluate()")

    def render(self, values: dict[str, Any]) -> str:
        """What evaluate returned, for the terminal."""
        width = max(map(len, values), default=0)
        return "\n".join(f"{key.ljust(width)}  {value}" for key, value in values.items())
