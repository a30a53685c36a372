"""Index scores: how much an indexer wants each key for each query."""

from .api import IndexFactors, pool_keys, score_tile, scores_at

__all__ = ["IndexFactors", "pool_keys", "score_tile", "scores_at"]
