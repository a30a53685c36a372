"""Indexers: which keys a query should see."""

from .base import BlockIndexer
from .hierarchical import HierarchicalIndexer
from .lightning import GatedLightningIndexer, LightningIndexer, ReluLightningIndexer
from .oracle import OracleIndexer
from .pooled import PooledIndexer
from .positional import RandomIndexer, StridedIndexer

__all__ = [
    "BlockIndexer",
    "GatedLightningIndexer",
    "HierarchicalIndexer",
    "LightningIndexer",
    "OracleIndexer",
    "PooledIndexer",
    "RandomIndexer",
    "ReluLightningIndexer",
    "StridedIndexer",
]
