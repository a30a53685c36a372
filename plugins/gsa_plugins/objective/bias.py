"""Index scores in the attention logits, so that the language-model loss trains the indexer."""

from typing import Any

import torch
from torch import Tensor

from gsa_kernels.indexer_loss.api import log_score_bias
from gsa_platform.contracts import LayerDims, Objective

from ..configs import BiasObjectiveConfig


class BiasObjective(Objective):
    """beta * log(score) on the attention logits of selected keys: the language-model loss
    reaches the indexer, and through it the layers below unless `detach` is set."""

    def __init__(self, config: BiasObjectiveConfig, dims: LayerDims) -> None:
        super().__init__()
        self.beta, self.detach_indexer = config.beta, config.detach

    @torch.compiler.disable
    def bias(self, factors: Any, selection: Any, previous: Tensor | None) -> Tensor | None:
        return log_score_bias(factors, selection, self.beta, previous)
