"""The learning study: budgets matched in mean keys, and a table that comes from its records."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from kernel_cases import make_factors

STUDY = Path(__file__).parents[2] / "experiments" / "learning"
NAMES = ("arms", "jobs", "report", "run", "ties")


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDY))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


def record(arm: str, seed: int, loss: float, recall: float | None = None) -> dict:
    last = {"step": 10, "loss": loss}
    if recall is not None:
        last |= {"recall": recall, "recall_best": 0.5, "keys_mean": 100.0}
    return {"arm": arm, "seed": seed, "history": [{**last, "step": 0}, last]}


def test_the_table(study):
    made = {
        "command": "python run.py",
        "device": "CPU",
        "commit": "abc",
        "dirty": False,
        "versions": {"packages": {"torch": "2"}},
    }
    runs = [record("kl", 0, 2.0, 0.25), record("kl", 1, 3.0, 0.35), record("dense", 0, 1.0)]
    runs.append({"arm": "oracle", "seed": 0, "error": "exit code 1"})
    text = study["report"].table(made | {"runs": runs})
    assert "| kl | 2 | 100 ± 0 | 30.0% ± 7.1 | 30.0% ± 7.1 | 50.0% ± 0.0 | 60.0% ± 14.1 |" in text
    assert "| dense | 1 | - | - |" in text and "| 1.0000 |" in text
    assert "Failed: oracle (seed 0)" in text


@pytest.mark.parametrize(("size", "tied"), [(1.0, 0.0), (1e4, 1.0)])
def test_ties_at_the_threshold(study, size, tied):
    factors = make_factors(400)
    factors = replace(factors, q_BTJI=(factors.q_BTJI * size).float(), k_BSI=factors.k_BSI.float())
    found = study["ties"].layer(factors, SimpleNamespace(k=100, window=16, sinks=4))
    assert found["tied"] == pytest.approx(tied, abs=0.2)  # a few by chance
    assert (found["ties"] > 10) == (found["beyond_8"] > 0.9) == (found["std"] > 100) == bool(tied)


@pytest.mark.parametrize("slope", [0.3, 0.7, 1.4])
def test_mean_keys_are_matched_in_a_few_rounds(study, slope):
    def mean_keys(k: int) -> float:  # a saturating response
        return min(60 + slope * k, 500.0)

    target, seen, k = 230.0, {}, 192
    for _ in range(4):
        seen[k] = mean_keys(k)
        k = study["run"].next_k(seen, k, target)
        assert k % 16 == 0
    assert abs(mean_keys(k) / target - 1) < 0.1


def test_arms_are_settings_that_exist(study):
    from gsa_platform import compose
    from gsa_platform.validate import validate

    parse, settings = study["run"].parser().parse_args, study["run"].settings
    common = [*settings(parse(["indexers"])), "objective=kl"]
    arms = study["arms"]
    for arm in arms.INDEXERS:
        job = study["run"].indexer_job(arm, 0, settings(parse(["indexers"])), 192)
        validate(compose.load(job.overrides))
    for arm in arms.BUDGETS:
        validate(compose.load([*common, *study["run"].overrides(arm, 192)]))
