"""Sparsity controllers that are wrong on purpose, each in one way."""

from __future__ import annotations

from dataclasses import dataclass

from gsa_platform import Component, hookimpl
from gsa_platform.contracts import Sparsity


@dataclass
class Budget:
    k: int = 256
    window: int = 128
    sinks: int = 64


@dataclass
class OverspendsConfig(Budget):
    name: str = "overspends"


@dataclass
class AveragesTheBatchConfig(Budget):
    name: str = "averages_the_batch"


@hookimpl
def gsa_register_sparsity():
    return [
        Component("overspends", "wrong_sparsities:Overspends", OverspendsConfig),
        Component(
            "averages_the_batch", "wrong_sparsities:AveragesTheBatch", AveragesTheBatchConfig
        ),
    ]


class Overspends(Sparsity):
    """A budget above max_keys."""

    def __init__(self, config, dims):
        super().__init__()
        self.window, self.sinks, self.max_keys = config.window, config.sinks, config.k

    def budget(self, *_):
        return 2 * self.max_keys


class AveragesTheBatch(Overspends):
    """Normalised by the present batch, which holds other samples and later tokens (the published
    code of adaptive budgets does this)."""

    statistics = ("variance",)

    def budget(self, *_):
        return self.rule

    def rule(self, statistics):
        variance = statistics["variance"]
        share = variance / variance.mean().clamp_min(1e-12)
        return (self.max_keys * share).clamp(self.window + 8, self.max_keys).long()
