"""Indexers that are wrong on purpose, each in one way."""

from __future__ import annotations

import dataclasses

import torch

from gsa_platform import Component, hookimpl
from gsa_plugins.configs import GatedLightningConfig
from gsa_plugins.indexer import GatedLightningIndexer


@dataclasses.dataclass
class LearnsNothingConfig(GatedLightningConfig):
    name: str = "learns_nothing"


@dataclasses.dataclass
class PoolsTheTileConfig(GatedLightningConfig):
    name: str = "pools_the_tile"


@hookimpl
def gsa_register_indexer():
    return [
        Component("learns_nothing", "wrong_indexers:LearnsNothing", LearnsNothingConfig),
        Component("pools_the_tile", "wrong_indexers:PoolsTheTile", PoolsTheTileConfig),
    ]


class LearnsNothing(GatedLightningIndexer):
    def forward(self, x_BTD, seq, spec):
        return super().forward(x_BTD, seq, spec).detach()


class PoolsTheTile(GatedLightningIndexer):
    """A tile's choice from all of its queries: the first one then knows the last one."""

    def forward(self, x_BTD, seq, spec):
        factors = super().forward(x_BTD, seq, spec)
        q, r = factors.q_BTJI, spec.query_tile
        tiles = [part.mean(1, keepdim=True).expand_as(part) for part in q.split(r, 1)]
        return dataclasses.replace(factors, q_BTJI=torch.cat(tiles, 1))
