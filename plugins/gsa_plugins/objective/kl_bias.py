"""Both signals at once: the KL to the attention, and the language-model loss through a bias."""

from typing import Any

import torch
from torch import Tensor

from gsa_kernels.indexer_loss.api import log_score_bias
from gsa_platform.contracts import LayerDims, Sequence

from ..configs import KlBiasObjectiveConfig
from .kl import KlObjective


class KlBiasObjective(KlObjective):
    """beta * log(score) on the logits of selected keys, and the KL loss beside it.

    The KL's target is attention without the bias: with it, the indexer would chase its own
    scores. On selected keys the bias is divided out of the mass (exact for each query, up to the
    weight that queries of one tile get in its mean). `detach` decides for both: true keeps the
    indexer's gradients, of either loss, out of the layers below.
    """

    def __init__(self, config: KlBiasObjectiveConfig, dims: LayerDims) -> None:
        super().__init__(config, dims)
        self.beta = config.beta

    @torch.compiler.disable
    def bias(self, factors: Any, selection: Any, previous: Tensor | None) -> Tensor | None:
        return log_score_bias(factors, selection, self.beta, previous)

    @torch.compiler.disable
    def loss(
        self,
        factors: Any,
        spec: Any,
        selection: Any,
        mass: Tensor | None,
        q_BTHE: Tensor,
        k_BSKE: Tensor,
        seq: Sequence,
    ) -> Tensor | None:
        if mass is not None and selection is not None:
            with torch.no_grad():
                mass = mass * (-log_score_bias(factors, selection, self.beta)).exp()
        return super().loss(factors, spec, selection, mass, q_BTHE, k_BSKE, seq)
