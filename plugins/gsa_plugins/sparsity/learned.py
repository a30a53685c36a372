"""A budget that a small network reads off the statistics of the scores, and learns."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsa_kernels.attention_mass import dense_mass
from gsa_kernels.index_score.api import BlockScores
from gsa_kernels.selection import SelectionSpec
from gsa_kernels.topk import comparable
from gsa_platform.contracts import Choice, LayerDims, Sequence, Sparsity

from ..configs import LearnedBudgetConfig
from ..dense import spread

FEATURES = 4


class LearnedBudget(Sparsity):
    """k_t = k_min (k_max / k_min)^sigmoid(f), f a network of count, mean, deviation and maximum.

    A hard top-k passes a budget no gradient, so the network is taught what the budget should have
    been: on `rows` query tiles a step, how many keys, in the indexer's own order, cover `mass` of
    the dense attention, window and sinks included. Its loss is the pinball loss of log k at
    `quantile` (Koenker and Bassett 1978): at 0.5 half of the queries get what they need. Scores,
    statistics, q and k are detached: the loss moves the network only. Statistics are those of one
    query's candidates, so nothing later and no other sample is seen.

    The public code of arXiv 2601.15305 has such a network without a loss. Raises ValueError
    unless 0 < k_min <= k <= k_max, and for mass or quantile outside (0, 1).
    """

    statistics = ("count", "mean", "variance", "max")

    def __init__(self, config: LearnedBudgetConfig, dims: LayerDims) -> None:
        super().__init__()
        if not 0 < config.k_min <= config.k <= config.k_max:
            raise ValueError(
                f"sparsity: k_min={config.k_min} <= k={config.k} <= k_max={config.k_max} must hold"
            )
        for name in ("mass", "quantile"):
            if not 0 < getattr(config, name) < 1:
                value = getattr(config, name)
                raise ValueError(f"sparsity.{name}={value} must lie between 0 and 1")
        self.window, self.sinks = config.window, config.sinks
        self.k, self.k_min, self.max_keys = config.k, config.k_min, config.k_max
        self.mass, self.quantile = config.mass, config.quantile
        self.rows, self.weight = config.rows, config.weight
        self.hidden = nn.Linear(FEATURES, config.hidden)
        self.out = nn.Linear(config.hidden, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.hidden.reset_parameters()
        nn.init.zeros_(self.out.weight)
        # Every budget starts at k, held off the ends, where the sigmoid would not move.
        span = math.log(self.max_keys / self.k_min)
        share = math.log(self.k / self.k_min) / span if span else 0.5
        share = min(0.98, max(0.02, share))
        nn.init.constant_(self.out.bias, math.log(share / (1 - share)))

    def log_keys(self, statistics: dict[str, Tensor]) -> Tensor:
        """[...] natural log of the budget in keys, differentiable."""
        count, mean, variance, largest = (statistics[n].double() for n in self.statistics)
        # Relative to the mean: indexers differ in scale, and one changes its own as it learns.
        scale = mean.abs().clamp_min(1e-6)
        deviation = variance.clamp_min(0).sqrt() / scale
        features = (
            count.log1p() - math.log(self.k),
            mean.clamp(-10, 10),
            deviation.clamp(0, 10),
            (largest / scale).clamp(-100, 100) / 10,
        )
        # In float64, so that the shape of a product does not move a budget across an integer.
        held = F.linear(
            torch.stack(features, -1), self.hidden.weight.double(), self.hidden.bias.double()
        )
        out = F.linear(held.tanh(), self.out.weight.double(), self.out.bias.double())
        span = math.log(self.max_keys / self.k_min)
        return math.log(self.k_min) + span * out.squeeze(-1).sigmoid()

    def budget(self, seq: Sequence, spec: Any = None) -> Callable[[dict[str, Tensor]], Tensor]:
        return self.rule

    def rule(self, statistics: dict[str, Tensor]) -> Tensor:
        """Budgets in keys, same shape as the statistics; k where nothing can be chosen."""
        keys = self.log_keys(statistics).exp().round().long()
        keys = keys.masked_fill(statistics["count"] < 1, self.k)
        return keys.clamp(self.k_min, self.max_keys)

    @torch.compiler.disable
    def loss(
        self, factors: BlockScores, choice: Choice, q_BTHE: Tensor, k_BSKE: Tensor, seq: Sequence
    ) -> Tensor | None:
        selection = choice.selection
        layout, total = selection.layout, []
        prepared = None
        for tile in spread(layout.n_tiles, self.rows, seq.step):
            part = slice(tile, tile + 1)
            statistics = {n: s[:, :, part] for n, s in choice.statistics.items()}
            if not bool((statistics["count"] > 0).any()):
                continue
            with torch.no_grad():
                if prepared is None:
                    prepared = factors.prepare(layout.spec.key_block, selection.doc_start_BS)
                n_blocks = int(layout.local_BQ[0, tile]) // layout.spec.key_block
                scores = factors.tile_scores(layout, part, n_blocks, prepared)
                mass = dense_mass(
                    q_BTHE, k_BSKE, layout, tile, selection.doc_start_BS, factors.heads
                )
                allowed = layout.candidates(part, n_blocks)[:, None]
                blocks = blocks_needed(
                    scores[:, :, 0], mass[..., :n_blocks], allowed[:, :, 0], self.mass
                )
                target = self._keys(blocks, layout.spec).double().log()
            error = target - self.log_keys(statistics)[:, :, 0]
            pinball = torch.maximum(self.quantile * error, (self.quantile - 1) * error)
            total.append(pinball[statistics["count"][:, :, 0] > 0].mean())
        if not total:
            return None
        return (self.weight * torch.stack(total).mean()).to(self.out.bias.dtype)

    def _keys(self, blocks: Tensor, spec: SelectionSpec) -> Tensor:
        keys = blocks * spec.key_block + spec.window + spec.sink_keys
        return keys.clamp(self.k_min, self.max_keys)


def blocks_needed(scores: Tensor, mass: Tensor, allowed: Tensor, share: float) -> Tensor:
    """[...] candidates, best score first, that with the keys attended anyway hold `share` of the
    attention mass. scores, mass, allowed: [..., blocks]; mass sums to 1 with the forced keys."""
    allowed = allowed.expand_as(mass)
    ranked = comparable(scores).masked_fill(~allowed, -torch.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    held = mass.double().masked_fill(~allowed, 0).gather(-1, order)
    forced = 1 - held.sum(-1, keepdim=True)
    reached = forced + held.cumsum(-1)
    needed = (reached < share - 1e-9).sum(-1) + 1
    needed = needed.masked_fill(forced.squeeze(-1) >= share - 1e-9, 0)
    return torch.minimum(needed, allowed.sum(-1))
