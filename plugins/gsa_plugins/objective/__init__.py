"""Objectives: how the indexer learns, since a hard top-k passes it no gradient."""

from .bias import BiasObjective
from .kl import KlObjective
from .kl_bias import KlBiasObjective

__all__ = ["BiasObjective", "KlBiasObjective", "KlObjective"]
