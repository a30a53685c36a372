"""Bad settings of first-party components are one clear message before anything is built."""

from __future__ import annotations

import pytest

from gsa_platform import compose, hardware, registry
from gsa_platform.bench.benchmark import Benchmark
from gsa_platform.errors import UserError
from gsa_platform.eval.task import EvalTask
from gsa_platform.validate import validate

FREE = "objective=none"
COARSE = ("indexer=hierarchical", "indexer.pool=32")
TOP_P = ("sparsity=top_p", "sparsity.k_min=96", "sparsity.k_max=256", "sparsity.window=64")


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setattr(
        hardware, "detect", lambda: hardware.Hardware("cpu", "CPU", 1, 16.0, 4, 16.0)
    )


def check(*overrides: str) -> None:
    validate(compose.load(["experiment=smoke", *overrides]))


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("indexer.heads=0",), ["indexer.heads=0", "at least 1"]),
        (("indexer.dim=7",), ["indexer.dim=7", "even", "indexer.dim=8", "indexer.rope=false"]),
        (("indexer=pooled", "indexer.pool=24"), ["indexer.pool=24", "16 keys", "indexer.pool=32"]),
        (("indexer=pooled", "indexer.pool=0"), ["indexer.pool=0 must be at least 1"]),
        (("indexer=pooled", "indexer.pooling=sum"), ["indexer.pooling=sum", "mean, max"]),
        (("indexer=pooled", "indexer.activation=relo"), ["Did you mean 'relu'"]),
        ((*COARSE, "indexer.survivors=3"), ["survivors=3", "256 keys", "indexer.survivors=8"]),
        ((*COARSE, "indexer.survivors=0"), ["indexer.survivors=0 must be at least 1"]),
        (("indexer=pooled", "indexer.pooling=bound"), ["indexer=pooled", "indexer=hierarchical"]),
        (
            (*COARSE, "indexer.pooling=bound", "indexer.activation=relu"),
            ["indexer.pooling=bound", "never negative", "indexer.activation=sigmoid"],
        ),
        (("indexer=oracle",), ["indexer=oracle has no parameters", "objective=none"]),
        (("indexer=random", "objective=bias"), ["objective=bias", "another indexer"]),
        (("indexer=strided", "objective=kl_bias"), ["nothing to train"]),
        (("indexer=strided", FREE, "indexer.stride=-1"), ["indexer.stride=-1"]),
        (
            ("indexer=oracle", FREE, "indexer.max_context=512"),
            ["max_context=512", "context=1024", "dense attention"],
        ),
        (("sparsity=adaptive_entropy", "sparsity.sign=up"), ["sparsity.sign=up", "increasing"]),
        (("sparsity=adaptive_entropy", "sparsity.temperature=0"), ["temperature=0", "above 0"]),
        (("sparsity=adaptive_entropy", "sparsity.decay=1"), ["decay=1", "below 1"]),
        ((*TOP_P, "sparsity.p=0"), ["sparsity.p=0", "above 0 and at most 1"]),
        ((*TOP_P, "sparsity.k_min=300"), ["k_min=300", "k_max=256"]),
        ((*TOP_P, "sparsity.k_min=80"), ["k_min=80", "window and sinks are 128 keys"]),
        (("sparsity=learned", "sparsity.mass=1"), ["sparsity.mass=1", "below 1"]),
        (("sparsity=learned", "sparsity.quantile=0"), ["sparsity.quantile=0"]),
        (("sparsity=learned", "sparsity.hidden=0"), ["sparsity.hidden=0"]),
        (("sparsity=learned", "sparsity.rows=0"), ["sparsity.rows=0"]),
        (("sparsity=scheduled", "sparsity.steps=0"), ["sparsity.steps=0"]),
        (("sparsity=scheduled", "sparsity.shape=cubic"), ["linear, cosine"]),
        (("sparsity=scheduled", "sparsity.k_start=512"), ["k_start=512", "sparsity.k=2048"]),
        (("gate.activation=gelu",), ["gate.activation=gelu", "sigmoid, silu, tanh"]),
        (("objective=kl_bias", "objective.beta=0"), ["objective.beta=0", "above 0"]),
        (("objective.weight=-1",), ["objective.weight=-1"]),
        (
            ("objective=kl_bias", "objective.dense_rows=0", "objective.selected=false"),
            ["nothing to learn from"],
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else None,
)
def test_refusals(overrides, parts):
    with pytest.raises(UserError) as caught:
        check(*overrides)
    for part in parts:
        assert part in str(caught.value)


def test_several_problems_are_told_together():
    with pytest.raises(UserError) as caught:
        check("indexer.heads=0", "objective.weight=-1")
    assert "indexer.heads=0" in str(caught.value) and "objective.weight=-1" in str(caught.value)


@pytest.mark.parametrize("slot", ["indexer", "sparsity", "gate", "objective"])
def test_every_component_is_accepted_as_it_comes(slot):
    for name in registry.get().names(slot):
        if name == "none" and slot in ("indexer", "sparsity"):
            continue
        free = [FREE] if name in ("oracle", "random", "strided") else []
        check("context=16384", f"{slot}={name}", *free)


def test_a_method_that_a_component_lacks_is_named():
    import torch

    from gsa_platform.contracts import Sparsity

    class Hollow(Sparsity):
        def __init__(self):
            torch.nn.Module.__init__(self)

    with pytest.raises(NotImplementedError, match=r"Hollow does not define budget\(\)"):
        Hollow().budget(None)


def test_a_benchmark_and_a_task_without_their_method_say_so() -> None:
    class Hollow(Benchmark, EvalTask):
        pass

    for method in ("run", "evaluate"):
        with pytest.raises(NotImplementedError, match=rf"Hollow does not define {method}\(\)"):
            getattr(Hollow(None), method)(None)
