"""kl_bias: the KL follows the attention without the bias that it adds itself."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import make_factors

from gsa_kernels.indexer_loss.api import log_score_bias, selected_kl
from gsa_kernels.select.api import select
from gsa_kernels.selection import SelectionSpec
from gsa_kernels.sparse_attention.api import sparse_attention
from gsa_platform.contracts import LayerDims, Sequence
from gsa_plugins import configs as c
from gsa_plugins.dense import spread
from gsa_plugins.objective import KlBiasObjective, KlObjective
from gsa_plugins.objective.kl import drawn

LENGTH = 60
DIMS = LayerDims(16, 1, 1, 8, context=LENGTH)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_target_is_the_attention_without_the_bias(beta):
    factors = make_factors(LENGTH)
    spec = SelectionSpec(4, 1, window=4)
    selection = select(factors, spec, 28, 28, LENGTH).selection
    g = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, LENGTH, 1, 8, generator=g, dtype=torch.float64) for _ in range(2))
    plain = sparse_attention(q, k, k, selection, need_mass=True).mass_BHQN
    bias = log_score_bias(factors, selection, beta)
    biased = sparse_attention(q, k, k, selection, bias_BHQN=bias, need_mass=True).mass_BHQN
    objective = KlBiasObjective(c.KlBiasObjectiveConfig(beta=beta, dense_rows=0), DIMS)
    torch.testing.assert_close(objective.bias(factors, selection, None), bias)
    loss = objective.loss(factors, spec, selection, biased, q, k, Sequence())
    torch.testing.assert_close(loss, selected_kl(factors, selection, plain, "log"))
    naive = selected_kl(factors, selection, biased, "log")
    assert abs(float(naive - loss)) > 1e-5


def test_it_warms_up_like_kl():
    config = {"warmup_steps": 3, "weight": 0.5, "dense_rows": 2}
    both = KlBiasObjective(c.KlBiasObjectiveConfig(**config), DIMS)
    kl = KlObjective(c.KlObjectiveConfig(**config), DIMS)
    for step in (0, 2, 3):
        assert both.dense(Sequence(step=step)) == kl.dense(Sequence(step=step)) == (step < 3)
    assert both.detach_indexer and both.need_mass


@pytest.mark.parametrize("start", [0, 37])
def test_the_tiles_drawn_are_spread_over_the_sequence(start, device):
    for length, tile, count in (
        (60, 16, 8),
        (131072, 64, 8),
        (1000, 1, 7),
        (1, 64, 3),
        (500, 3, 99),
    ):
        q = torch.empty(1, length, 1, 8, device=device)
        tiles = -(-(start + length) // tile) - start // tile
        for step in (0, 1, 2, 55, 100_000):
            assert drawn(q, start, tile, count, step).tolist() == spread(tiles, count, step)
