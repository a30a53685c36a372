"""The index distribution follows the attention: a KL loss on detached inputs."""

from typing import Any

import torch
from torch import Tensor

from gsa_kernels.indexer_loss.api import DISTRIBUTIONS, dense_kl, selected_kl
from gsa_platform.contracts import Indexer, LayerDims, Objective, Sequence

from ..configs import KlObjectiveConfig
from .described import described


class KlObjective(Objective):
    """KL from the attention to the index distribution, on detached inputs (DeepSeek-V3.2).

    Two parts, added: over every candidate key for `dense_rows` query tiles per sequence, different
    ones every step (its cost is linear in the context), and over the selected keys of every tile.
    During `warmup_steps` attention is dense and only the first part exists.
    """

    def __init__(self, config: KlObjectiveConfig, dims: LayerDims) -> None:
        super().__init__()
        if config.distribution not in DISTRIBUTIONS:
            choices = " or ".join(DISTRIBUTIONS)
            raise ValueError(f"objective.distribution={config.distribution!r}: choose {choices}")
        if not config.selected and config.dense_rows == 0:
            raise ValueError(
                "objective kl has nothing to learn from: set objective.selected=true or "
                "objective.dense_rows above 0"
            )
        if config.warmup_steps and config.dense_rows == 0:
            raise ValueError("objective.warmup_steps needs objective.dense_rows above 0")
        self.weight, self.warmup_steps = config.weight, config.warmup_steps
        self.dense_rows, self.selected = config.dense_rows, config.selected
        self.distribution = config.distribution
        self.detach_indexer, self.need_mass = config.detach, config.selected

    def dense(self, seq: Sequence) -> bool:
        return self.training and seq.step < self.warmup_steps

    def describe(self, device_type: str, spec: Any, indexer: Indexer) -> str:
        return described(device_type, spec, indexer)

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
        total: Tensor | None = None
        if self.dense_rows:
            tiles = drawn(q_BTHE, seq.q_start, spec.query_tile, self.dense_rows, seq.step)
            total = dense_kl(
                factors,
                q_BTHE.detach(),
                k_BSKE.detach(),
                spec,
                tiles,
                seq.doc_start_BS,
                self.distribution,
            )
        if self.selected and selection is not None and mass is not None:
            part = selected_kl(factors, selection, mass, self.distribution)
            total = part if total is None else total + part
        return None if total is None else self.weight * total


def drawn(q_BTHE: Tensor, q_start: int, tile: int, count: int, step: int) -> Tensor:
    """[count] tile numbers, `dense.spread` of all tiles; never waits for the device of q.

    Its arithmetic in float64 is that of Python, so every device draws the same.
    """
    n = -(-(q_start + q_BTHE.shape[1]) // tile) - q_start // tile
    count = min(n, count)
    shift = (step * 0.6180339887498949 + 0.5) % 1.0
    place = torch.arange(count, device=q_BTHE.device, dtype=torch.float64) + shift
    # A GPU would multiply by the reciprocal of a plain number.
    return (place * n / torch.full_like(place, count)).long()
