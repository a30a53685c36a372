"""Indexers: which keys a query should see."""

from .lightning import GatedLightningIndexer, LightningIndexer, ReluLightningIndexer

__all__ = ["GatedLightningIndexer", "LightningIndexer", "ReluLightningIndexer"]
