"""Index scores: the interface that selection reads, and the score functions there are."""

from .factors import ACTIVATIONS, BLOCK_SCORES, IndexFactors
from .keys import pool_keys
from .scores import _CHUNK, BlockScores, Scored, scores_at

__all__ = [
    "ACTIVATIONS",
    "BLOCK_SCORES",
    "BlockScores",
    "IndexFactors",
    "Scored",
    "pool_keys",
    "scores_at",
    "_CHUNK",
]
