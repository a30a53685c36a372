"""Coarse to fine: pooled keys first, exact scores only inside the best pooling blocks."""

from typing import Any

from gsa_kernels.index_score.api import BOUND, HierarchicalFactors
from gsa_kernels.selection import SelectionSpec
from gsa_platform.contracts import LayerDims
from gsa_platform.model.flops import indexer_scoring_flops

from ..configs import HierarchicalIndexerConfig
from .lightning import LightningIndexer


class HierarchicalIndexer(LightningIndexer):
    """Lightning scores inside the `survivors` best pooling blocks of `pool` keys.

    Scores S / pool pooled keys and survivors x pool single ones (or as many key blocks) instead
    of S. The candidates of a query, their statistics and the choice are those of the survivors,
    so a budget above survivors x pool keys cannot be filled. Training losses see exact scores of
    every key: pooled and single keys share the projections. After coarse-to-fine selection in
    NSA (arXiv 2502.11089) and the token-level stage of DeepSeek-V3.2. pooling=bound takes the
    blocks with the best upper bounds of their keys' scores (Quest, arXiv 2406.10774). Raises
    ValueError for an unknown setting and for bounds of ReLU scores.
    """

    def __init__(self, config: HierarchicalIndexerConfig, dims: LayerDims) -> None:
        super().__init__(
            config,
            dims,
            config.activation,
            config.block_score,
            head_bias=config.activation == "sigmoid",
        )
        if config.pooling == BOUND and config.activation != "sigmoid":
            raise ValueError("indexer.pooling='bound' needs indexer.activation='sigmoid'")
        self.pool, self.pooling, self.survivors = config.pool, config.pooling, config.survivors

    def factors(self, **parts: Any) -> HierarchicalFactors:
        return HierarchicalFactors(
            **parts, pool=self.pool, pooling=self.pooling, survivors=self.survivors
        )

    def flops(self, context: int, spec: SelectionSpec) -> int:
        coarse = indexer_scoring_flops(
            self.q_proj.in_features, self.heads, self.dim, context // spec.query_tile, self.pool
        )
        if self.pooling == BOUND:  # products of twice the width
            coarse += self.heads * self.dim * (context // spec.query_tile) // self.pool
        block = spec.key_block if self.block_score == "mean" else 1
        fine = min(self.survivors * self.pool, context) // block
        return coarse + 2 * self.heads * self.dim * fine // spec.query_tile
