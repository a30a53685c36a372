"""Every combination of components works or is refused with a reason, and the table says which."""

from __future__ import annotations

import itertools
import json
import random
import re

import pytest
import torch

from gsa_platform import compose, registry
from gsa_platform.components import SLOTS
from gsa_platform.errors import UserError
from gsa_platform.testing.matrix import BROKEN, REFUSED, WORKS, Matrix
from gsa_platform.testing.matrix_text import boxes, by_reason, render
from gsa_platform.validate import validate

CRASHES = """
from dataclasses import dataclass
from gsa_platform import Component, hookimpl
from gsa_platform.contracts import Gate

@dataclass
class Config:
    name: str = "crashes"

@hookimpl
def gsa_register_gate():
    return Component("crashes", "crashes:Crashes", Config)

class Crashes(Gate):
    def forward(self, x_BTD):
        raise RuntimeError("no such luck")
"""


@pytest.fixture(scope="module")
def outcomes():
    torch.set_num_threads(1)
    return Matrix().run()


def test_no_combination_is_broken(outcomes):
    assert [f"{o.combination}: {o.reason}" for o in outcomes if o.result == BROKEN] == []
    assert {o.result for o in outcomes} == {WORKS, REFUSED}
    assert all(o.reason for o in outcomes if o.result == REFUSED)


def test_every_combination_is_tried_once(outcomes):
    found = registry.get()
    modes = [found.component("attention", n).capabilities.modes for n in found.names("attention")]
    count = sum(len(m) or 1 for m in modes)
    for slot in SLOTS[1:]:
        count *= len(found.names(slot))
    assert len({str(o.combination) for o in outcomes}) == len(outcomes) == count


def test_the_outcomes_are_those_of_the_command_line(outcomes):
    matrix = Matrix()
    for outcome in random.Random(0).sample(outcomes, 24):
        chosen = outcome.combination
        typed = [f"{slot}={chosen.names[slot]}" for slot in SLOTS]
        typed += ["picked.hardware=none", "trainer.accelerator=cpu", "model.d_model=32"]
        typed += ["model.n_heads=4", "model.n_kv_heads=2", "model.head_dim=8", "context=100"]
        sizes = matrix._granularity(chosen)
        for slot in ("attention", "sparsity"):
            names = registry.get().component(slot, chosen.names[slot]).config.__annotations__
            values = {**sizes.values(slot), "mode": sizes.mode}
            typed += [f"{slot}.{k}={v}" for k, v in values.items() if k in names and v]
        if outcome.result == WORKS:
            validate(compose.load(typed))
        else:
            with pytest.raises(UserError) as caught:
                validate(compose.load(typed))
            assert outcome.reason.partition(" (you set")[0] in str(caught.value)


def test_the_text_counts_everything(outcomes):
    text = render(outcomes, 1.0)
    works = [o for o in outcomes if o.result == WORKS]
    assert f"{len(outcomes):,} combinations: {len(works):,} works" in text
    row = r"attention=dense(,\w+)* indexer=none sparsity=none gate=\* objective=none"
    assert re.search(row, text)
    assert len(text.splitlines()) < 60
    refused = [o for o in outcomes if o.result == REFUSED]
    assert sum(map(len, by_reason(refused).values())) == len(refused)


def test_boxes_are_the_rows():
    rows = set(itertools.product("ab", "xyz", "12")) - {("a", "x", "1"), ("b", "z", "2")}
    found = boxes(rows)
    listed = [row for box in found for row in itertools.product(*box)]
    assert sorted(listed) == sorted(rows) and len(found) < len(rows) / 2


def test_an_unexpected_error_is_shown_as_broken(cli, plugin):
    site = plugin("crashes", CRASHES)
    done = cli("plugins", "matrix", "gate=crashes,none", "attention=dense", "--slot", "gate",
               site=site)  # fmt: skip
    assert done.returncode == 1
    assert "1 works, 0 refused, 1 BROKEN" in done.stdout
    assert "RuntimeError: no such luck" in done.stdout


def test_the_command_line(cli):
    done = cli("plugins", "matrix", "--slot", "gate", "attention=gsa", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["combinations"]
    assert {row["attention"] for row in told} == {"gsa/token", "gsa/block", "gsa/tile"}
    assert {row["result"] for row in told} == {WORKS}
    wrong = cli("plugins", "matrix", "--slot", "gat")
    assert wrong.returncode == 2 and "Did you mean 'gate'" in wrong.stderr
