"""Budgets: how many keys a query may attend."""

from .adaptive_entropy import AdaptiveEntropyBudget
from .adaptive_variance import AdaptiveVarianceBudget
from .fixed import FixedBudget
from .learned import LearnedBudget
from .scheduled import ScheduledBudget
from .top_p import TopPBudget

__all__ = [
    "AdaptiveEntropyBudget",
    "AdaptiveVarianceBudget",
    "FixedBudget",
    "LearnedBudget",
    "ScheduledBudget",
    "TopPBudget",
]
