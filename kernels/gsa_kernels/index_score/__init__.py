"""Index scores: how much an indexer wants each key for each query."""

from .api import BlockScores, IndexFactors, Scored, pool_keys, scores_at

__all__ = ["BlockScores", "IndexFactors", "Scored", "pool_keys", "scores_at"]
