"""Index scores: the interface that selection reads, and the score functions there are."""

from .attention import AttentionScores
from .factors import ACTIVATIONS, BLOCK_SCORES, IndexFactors
from .fp8 import FP8, KEY_DTYPES, fp8_keys
from .hierarchical import HierarchicalFactors
from .keys import pool_keys
from .pooled import BOUND, POOLINGS, PooledFactors
from .position import RandomScores, StridedScores
from .scores import _CHUNK, BlockScores, Scored, scores_at

__all__ = [
    "ACTIVATIONS",
    "BLOCK_SCORES",
    "BOUND",
    "FP8",
    "KEY_DTYPES",
    "POOLINGS",
    "AttentionScores",
    "BlockScores",
    "HierarchicalFactors",
    "IndexFactors",
    "PooledFactors",
    "RandomScores",
    "Scored",
    "StridedScores",
    "fp8_keys",
    "pool_keys",
    "scores_at",
    "_CHUNK",
]
