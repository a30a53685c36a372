"""Budgets: what each controller makes of the scores, and that statistics are what they say."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import granularity_id, make_documents, make_factors

from gsa_kernels.attention_mass import probe
from gsa_kernels.index_score.api import IndexFactors
from gsa_kernels.select.api import STATISTICS, select
from gsa_kernels.select.statistics import BINS, bin_values, candidate_statistics
from gsa_kernels.selection import SelectionSpec, tile_layout
from gsa_platform.contracts import Choice, LayerDims, Sequence
from gsa_plugins import configs as c
from gsa_plugins.sparsity import (
    AdaptiveEntropyBudget,
    AdaptiveVarianceBudget,
    LearnedBudget,
    ScheduledBudget,
    TopPBudget,
)
from gsa_plugins.sparsity.learned import blocks_needed

DIMS = LayerDims(16, 4, 2, 8, context=100)
SEQ = Sequence()
BOUNDS = {"k_min": 16, "k_max": 70, "window": 7, "sinks": 3}


def adaptive(kind, config, **settings):
    return kind(config(k=40, **BOUNDS, **settings), DIMS)


def learned(**settings):
    torch.manual_seed(0)
    budget = LearnedBudget(c.LearnedBudgetConfig(k=40, **BOUNDS, **settings), DIMS)
    with torch.no_grad():
        for p in budget.parameters():
            p += 0.5 * torch.randn(p.shape)
    return budget


CONTROLLERS = {
    "variance_decreasing": lambda: adaptive(AdaptiveVarianceBudget, c.AdaptiveVarianceConfig),
    "variance_logistic": lambda: adaptive(
        AdaptiveVarianceBudget, c.AdaptiveVarianceConfig, sign="increasing", form="logistic"
    ),
    "entropy_increasing": lambda: adaptive(AdaptiveEntropyBudget, c.AdaptiveEntropyConfig),
    "entropy_decreasing": lambda: adaptive(
        AdaptiveEntropyBudget, c.AdaptiveEntropyConfig, sign="decreasing", temperature=2.0
    ),
    "top_p": lambda: TopPBudget(c.TopPConfig(p=0.4, **BOUNDS), DIMS),
    "learned": learned,
}


@pytest.mark.parametrize("name", CONTROLLERS)
@pytest.mark.parametrize("granularity", [(1, 1), (4, 1), (4, 16)], ids=granularity_id)
@pytest.mark.parametrize("documents", [False, True], ids=["one_doc", "docs"])
@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
def test_eager_budgets_are_the_reference(name, granularity, documents, activation):
    factors = make_factors(100, heads=2, activation=activation)
    spec = SelectionSpec(*granularity, window=7, sinks=3, heads=2)
    docs = make_documents(100) if documents else None
    controller = CONTROLLERS[name]()
    found = select(factors, spec, 0, 0, 100, docs, None, controller.statistics).statistics
    controller.observe({n: s[found["count"] > 0].mean(0) for n, s in found.items()})
    args = (factors, spec, controller.budget(SEQ, spec), controller.max_keys, 100, docs, None)
    eager, reference = (
        select(*args, controller.statistics, impl=impl) for impl in ("eager", "reference")
    )
    assert torch.equal(eager.selection.blocks_BHQN, reference.selection.blocks_BHQN)
    if granularity == (1, 1) and not documents:
        pruned = eager.selection.counts_BHQ < eager.statistics["count"]
        assert len(eager.selection.counts_BHQ[pruned].unique()) > 1


def test_statistics_by_hand():
    scores = torch.tensor([[0.5, 0.125, 0.25, 9.0, 0.125], [1.0, 1.0, 1.0, 1.0, 1.0]])
    allowed = torch.tensor([[True, True, True, False, True], [True] * 5])
    found = candidate_statistics(scores, allowed, STATISTICS)
    assert found["count"].tolist() == [4, 5] and found["mean"].tolist() == [0.25, 1]
    assert found["variance"].tolist() == pytest.approx([0.0234375, 0])
    assert found["max"].tolist() == [0.5, 1]
    assert found["entropy"].tolist() == pytest.approx([1.75 * math.log(2) - math.log(4), 0])
    filled = found["histogram"][0].nonzero().flatten()
    assert found["histogram"][0, filled].tolist() == [2, 1, 1]
    octaves = [(24 - 3) * 8, (24 - 2) * 8, (24 - 1) * 8]
    assert filled.tolist() == octaves
    none = candidate_statistics(scores, torch.zeros_like(allowed), STATISTICS)
    assert all(not value.any() for value in none.values())
    empty = candidate_statistics(scores[:, :0], allowed[:, :0], STATISTICS)
    assert all(not value.any() for value in empty.values())


def test_extreme_scores_land_in_the_outer_bins():
    scores = torch.tensor([[-3.0, 0.0, 1e-9, 1e9, 3.0]])
    found = candidate_statistics(scores, torch.ones(1, 5, dtype=torch.bool), ("histogram",))
    row = found["histogram"][0]
    assert row[0] == 3 and row[-1] == 1 and row.sum() == 5
    value = bin_values()[row[1:-1].argmax() + 1]
    assert abs(float(value) / 3 - 1) < 0.07 and len(bin_values()) == BINS


def test_an_unknown_statistic_is_refused():
    with pytest.raises(ValueError, match="'kurtosis' is not one of count, mean"):
        select(make_factors(20), SelectionSpec(4, 4), 16, 16, 20, statistics=("kurtosis",))


@pytest.mark.parametrize("p", [0.05, 0.3, 0.8, 0.999, 1.0])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_top_p_is_the_smallest_budget_with_that_share(p, spread):
    g = torch.Generator().manual_seed(1)
    scores = (spread * torch.randn(64, 500, generator=g) - 3).exp().clamp_max(250)
    found = candidate_statistics(scores, torch.ones(64, 500, dtype=torch.bool), ("histogram",))
    controller = TopPBudget(c.TopPConfig(p=p, k_min=1, k_max=10_000, window=1, sinks=0), DIMS)
    n = controller.blocks(found["histogram"])
    share = scores.sort(-1, descending=True).values.double().cumsum(-1)
    share = share / share[:, -1:]
    with_n = share.gather(-1, (n - 1).clamp_min(0)[:, None])[:, 0]
    one_less = torch.where(n > 1, share.gather(-1, (n - 2).clamp_min(0)[:, None])[:, 0], 0)
    assert (with_n > p - 0.02).all() and (one_less < min(p + 0.02, 1)).all()
    spec = SelectionSpec(4, 4, window=8, sinks=3)
    assert torch.equal(controller.rule(found, spec), (n * 4 + 1 + 4).clamp(1, 10_000))


def test_top_p_without_scores_takes_the_least():
    controller = TopPBudget(c.TopPConfig(p=0.5, **BOUNDS), DIMS)
    assert controller.rule({"histogram": torch.zeros(1, 1, 3, BINS)}).tolist() == [[[16] * 3]]


@pytest.mark.parametrize("form", ["ratio", "logistic"])
@pytest.mark.parametrize("sign", ["increasing", "decreasing"])
def test_entropy_signs(sign, form):
    controller = adaptive(AdaptiveEntropyBudget, c.AdaptiveEntropyConfig, sign=sign, form=form)
    controller.observe({"entropy": torch.tensor(-0.03)})
    entropy = torch.tensor([[[-0.3, -0.03, -0.003, -0.03]]])
    count = torch.tensor([[[50.0, 50.0, 50.0, 1.0]]])
    peaked, usual, flat, alone = controller.rule({"count": count, "entropy": entropy})[0, 0]
    assert usual == alone == 40
    assert (peaked < usual < flat) if sign == "increasing" else (peaked > usual > flat)
    if form == "ratio":
        assert {int(peaked), int(flat)} == {16, 70}
    else:
        assert all(20 <= x <= 60 for x in (peaked, flat))


def test_schedules():
    def keys(shape, step, training=True, **settings):
        config = c.ScheduledBudgetConfig(k=40, steps=100, shape=shape, **settings)
        return ScheduledBudget(config, DIMS).train(training).budget(Sequence(step=step))

    assert [keys("linear", s) for s in (0, 50, 100, 1000)] == [100, 70, 40, 40]
    assert [keys("cosine", s) for s in (0, 50, 100)] == [100, 70, 40]
    assert keys("cosine", 25) > keys("linear", 25) and keys("cosine", 75) < keys("linear", 75)
    assert keys("linear", 0, k_start=60) == 60 and keys("linear", 0, training=False) == 40


def test_blocks_needed_by_brute_force():
    g = torch.Generator().manual_seed(0)
    scores, mass = torch.rand(20, 12, generator=g), torch.rand(20, 12, generator=g)
    allowed = torch.rand(20, 12, generator=g) > 0.3
    mass = 0.8 * mass / mass.sum(-1, keepdim=True)
    for share in (0.1, 0.5, 0.9, 0.9999):
        got = blocks_needed(scores, mass, allowed, share)
        for row in range(20):
            order = sorted(
                allowed[row].nonzero().flatten().tolist(), key=lambda j: -scores[row, j]
            )
            held = 1 - float(mass[row][allowed[row]].sum())
            n = 0
            while held < share - 1e-9 and n < len(order):
                held += float(mass[row, order[n]])
                n += 1
            assert int(got[row]) == n


def planted(sharp: torch.Tensor, length: int = 256):
    """(factors, q, k): index and attention agree; sharp queries attend fewer keys."""
    g = torch.Generator().manual_seed(2)
    k = torch.randn(1, length, 1, 8, generator=g)
    q = torch.randn(1, length, 1, 8, generator=g) * sharp[None, :, None, None]
    factors = IndexFactors(
        q, k[:, :, 0], torch.ones(1, length, 1), None, 8**-0.5, "sigmoid", "mean"
    )
    return factors, q, k


@pytest.mark.parametrize("quantile", [0.5, 0.8])
def test_a_learned_budget_reaches_its_share(quantile):
    torch.manual_seed(0)
    length = 256
    sharp = torch.where(torch.arange(length) % 2 == 0, 6.0, 0.5)
    factors, q, k = planted(sharp)
    config = c.LearnedBudgetConfig(
        k=64, k_min=5, k_max=256, window=4, sinks=0, mass=0.8, quantile=quantile, rows=16
    )
    controller = LearnedBudget(config, LayerDims(8, 1, 1, 8, length))
    spec = SelectionSpec(1, 1, window=4)

    def choose():
        names = controller.statistics
        chosen = select(factors, spec, controller.rule, 256, length, statistics=names)
        return Choice(chosen.selection, chosen.statistics)

    assert (choose().selection.attended_BHT()[..., 64:] == 64).all()
    optimizer = torch.optim.Adam(controller.parameters(), lr=0.02)
    losses = []
    for step in range(200):
        loss = controller.loss(factors, choose(), q, k, Sequence(step=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])
    keys = choose().selection.attended_BHT()[0, 0, 128:].double()
    assert keys[::2].mean() < 0.6 * keys[1::2].mean()  # sharp queries get fewer
    layout = tile_layout(spec, length, length)
    covered = probe(q, k, layout, list(range(64, length)), choose().selection).covered
    reached = float((covered >= 0.8 - 1e-6).double().mean())
    assert abs(reached - quantile) < 0.15


def test_a_learned_budget_has_no_loss_without_candidates():
    factors = make_factors(20)
    spec = SelectionSpec(4, 4, window=32)
    controller = learned()
    chosen = select(factors, spec, controller.rule, 70, 20, statistics=controller.statistics)
    q = torch.zeros(2, 20, 4, 8)
    assert controller.loss(factors, Choice(chosen.selection, chosen.statistics), q, q, SEQ) is None
    assert (controller.rule(chosen.statistics) == 40).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TopPBudget(c.TopPConfig(p=1.5), DIMS), "sparsity.p=1.5"),
        (lambda: TopPBudget(c.TopPConfig(k_min=9000), DIMS), "k_min=9000"),
        (lambda: LearnedBudget(c.LearnedBudgetConfig(k=1), DIMS), "k=1"),
        (lambda: LearnedBudget(c.LearnedBudgetConfig(mass=1.0), DIMS), "sparsity.mass"),
        (lambda: LearnedBudget(c.LearnedBudgetConfig(quantile=0), DIMS), "sparsity.quantile"),
        (lambda: ScheduledBudget(c.ScheduledBudgetConfig(shape="step"), DIMS), "linear or cosine"),
        (lambda: ScheduledBudget(c.ScheduledBudgetConfig(steps=0), DIMS), "sparsity.steps=0"),
        (lambda: ScheduledBudget(c.ScheduledBudgetConfig(k_start=9), DIMS), "k_start=9"),
        (
            lambda: AdaptiveEntropyBudget(c.AdaptiveEntropyConfig(sign="up"), DIMS),
            "decreasing or increasing",
        ),
    ],
)
def test_bad_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
