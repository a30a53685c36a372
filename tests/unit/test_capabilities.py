"""Components that do not fit together are refused by what they say of themselves."""

from __future__ import annotations

import pytest

from gsa_platform import compose, hardware, plugin_commands, registry
from gsa_platform.capabilities import attentions, unmet
from gsa_platform.errors import UserError
from gsa_platform.validate import validate

pytestmark = pytest.mark.usefixtures("fresh_registry")

PLUGIN = """
from dataclasses import dataclass
from gsa_platform import Capabilities, Component, hookimpl

@dataclass
class Config:
    name: str = "acme"
    mode: str = "tile"
    key_block: int = 16
    query_tile: int = 16

@hookimpl
def gsa_register_attention():
    can = Capabilities(
        devices=("cuda",), modes=("tile",), bias=True,
        reasons={"devices": "acme burns on cpus", "mass": "acme keeps no probabilities"},
    )
    return Component("acme", "narrow_plugin:Built", Config, "A test component", can)
"""


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(
        hardware, "detect", lambda: hardware.Hardware("cuda", "GPU", 1, 80.0, 4, 16.0)
    )


@pytest.fixture
def acme(plugin, monkeypatch):
    site = plugin("narrow_plugin", PLUGIN)
    monkeypatch.syspath_prepend(str(site))
    registry.reset()


def load(*overrides: str):
    return compose.load(["picked.hardware=none", "attention=acme", *overrides])


def test_a_missing_capability_names_the_reason_and_the_remedies(acme):
    with pytest.raises(UserError) as caught:
        validate(load("objective=kl"))
    for part in ("objective=kl", "objective.selected=true", "attention=acme", "no probabilities"):
        assert part in str(caught.value)
    assert "Type objective.selected=false or attention=gsa" in str(caught.value)


@pytest.mark.parametrize("objective", [["objective=bias"], ["objective=none"]])
def test_what_is_not_asked_for_is_not_missing(acme, objective):
    assert list(unmet(load(*objective))) == []


def test_a_setting_that_asks_for_nothing_is_allowed(acme):
    assert list(unmet(load("objective=kl", "objective.selected=false"))) == []


def test_every_layer_counts(acme):
    pattern = "model.layer_pattern=[acme:1,'*']"
    cfg = compose.load(["picked.hardware=none", "attention=gsa", "objective=kl", pattern])
    assert attentions(cfg) == ["acme", "gsa"]
    assert len(list(unmet(cfg))) == 1


def test_a_device_is_refused_with_the_reason(acme):
    with pytest.raises(UserError, match="not on cpu: acme burns on cpus"):
        validate(load("objective=none", "trainer.accelerator=cpu"))


def test_show_tells_capabilities_and_reasons(acme):
    found = registry.get()
    text = plugin_commands.show_text(found, "acme")
    assert "no mass, bias" in text and "acme keeps no probabilities" in text
    assert "mass" not in plugin_commands.show_text(found, "dense")
    kl = plugin_commands.show_text(found, "kl")
    assert "needs an attention with mass if objective.selected=true" in kl
