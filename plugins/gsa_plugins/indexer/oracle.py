"""A control that sees the answer: the attention itself chooses its keys."""

import torch
from torch import Tensor

from gsa_kernels.index_score.api import AttentionScores
from gsa_kernels.selection import SelectionSpec
from gsa_platform.contracts import LayerDims, Sequence

from ..configs import OracleIndexerConfig
from .base import BlockIndexer


class OracleIndexer(BlockIndexer):
    """Scores are the attention probabilities of the tile's anchor query, from the layer's q and k.

    The ceiling of every study, and no indexer: it computes the dense attention of one query per
    tile to choose what the sparse one reads. Where queries share a choice (R > 1) it knows the
    anchor only, as anything causal must, so it is the best for the anchor, not for the tile.
    Raises ValueError for a context above max_context.
    """

    needs_attention = True

    def __init__(self, config: OracleIndexerConfig, dims: LayerDims) -> None:
        super().__init__()
        if dims.context > config.max_context:
            raise ValueError(
                f"context={dims.context} is above indexer.max_context={config.max_context}: the "
                "oracle costs as much as dense attention"
            )
        self.flops_per_key = 2 * dims.n_heads * dims.head_dim

    def outline(self, spec: SelectionSpec, keys: int) -> AttentionScores:
        none = torch.empty(1, keys, 0, device="meta")
        return AttentionScores(none, none, none, spec.heads)

    def forward(
        self,
        x_BTD: Tensor,
        seq: Sequence,
        spec: SelectionSpec,
        q_BTHE: Tensor | None = None,
        k_BSKE: Tensor | None = None,
    ) -> AttentionScores:
        assert q_BTHE is not None and k_BSKE is not None
        none = x_BTD.new_zeros(*x_BTD.shape[:2], 0)
        return AttentionScores(none, q_BTHE, k_BSKE, spec.heads, seq.q_start)

    def flops(self, context: int, spec: SelectionSpec) -> int:
        return self.flops_per_key * (context // 2) // spec.query_tile
