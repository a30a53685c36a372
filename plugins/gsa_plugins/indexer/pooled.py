"""Coarse scores: one for all keys of a pooling block."""

from typing import Any

from gsa_kernels.index_score.api import PooledFactors
from gsa_kernels.selection import SelectionSpec
from gsa_platform.contracts import LayerDims
from gsa_platform.model.flops import indexer_scoring_flops

from ..configs import PooledIndexerConfig
from .lightning import LightningIndexer


class PooledIndexer(LightningIndexer):
    """Lightning scores of keys pooled `pool` at a time: S / pool of them for a context of S.

    All keys of a pooling block share a score, in every mode; where the budget ends inside a
    block, its first keys are taken. Mean pooling is the block representative of MoBA (arXiv
    2502.13189); max takes the largest value of each channel. Raises ValueError for an unknown
    setting, and, when used, for a pool that is no multiple of the selection's key block.
    """

    def __init__(self, config: PooledIndexerConfig, dims: LayerDims) -> None:
        super().__init__(config, dims, config.activation, head_bias=config.activation == "sigmoid")
        self.pool, self.pooling = config.pool, config.pooling

    def factors(self, **parts: Any) -> PooledFactors:
        return PooledFactors(**parts, pool=self.pool, pooling=self.pooling)

    def flops(self, context: int, spec: SelectionSpec) -> int:
        return indexer_scoring_flops(
            self.q_proj.in_features, self.heads, self.dim, context // spec.query_tile, self.pool
        )
