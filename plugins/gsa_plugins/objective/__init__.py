"""Objectives: how the indexer learns, since a hard top-k passes it no gradient."""

from .bias import BiasObjective
from .kl import KlObjective

__all__ = ["BiasObjective", "KlObjective"]
