"""Budgets: how many keys a query may attend."""

from .adaptive_variance import AdaptiveVarianceBudget
from .fixed import FixedBudget

__all__ = ["AdaptiveVarianceBudget", "FixedBudget"]
