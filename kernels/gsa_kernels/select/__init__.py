"""Selection of key blocks: streamed scores, budgets, exact top-k."""

from .api import Chosen, select

__all__ = ["Chosen", "select"]
