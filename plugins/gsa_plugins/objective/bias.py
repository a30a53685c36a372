"""Index scores in the attention logits, so that the language-model loss trains the indexer."""

from typing import Any

import torch
from torch import Tensor

from gsa_kernels.indexer_loss.api import log_score_bias
from gsa_platform.contracts import Indexer, LayerDims, Objective

from ..configs import BiasObjectiveConfig
from .described import described


class BiasObjective(Objective):
    """beta * log(score) on the attention logits of selected keys: the language-model loss
    reaches the indexer, and through it the layers below unless `detach` is set."""

    def __init__(self, config: BiasObjectiveConfig, dims: LayerDims) -> None:
        super().__init__()
        self.beta, self.detach_indexer = config.beta, config.detach

    def describe(self, device_type: str, spec: Any, indexer: Indexer) -> str:
        return described(device_type, spec, indexer)

    @torch.compiler.disable
    def bias(self, factors: Any, selection: Any, previous: Tensor | None) -> Tensor | None:
        return log_score_bias(factors, selection, self.beta, previous)
