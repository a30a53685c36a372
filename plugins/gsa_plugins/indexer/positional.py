"""Controls without parameters, keys or content: a random and an evenly spread choice."""

import torch
from torch import Tensor

from gsa_kernels.index_score.api import RandomScores, StridedScores
from gsa_kernels.selection import SelectionSpec
from gsa_platform.contracts import LayerDims, Sequence

from ..configs import RandomIndexerConfig, StridedIndexerConfig
from .base import BlockIndexer


class RandomIndexer(BlockIndexer):
    """Each query draws its keys uniformly: a hash of (seed, layer, head, query, key).

    The floor of every study: what any choice of as many keys covers. Deterministic, the same in
    training and decoding, and blind to content.
    """

    def __init__(self, config: RandomIndexerConfig, dims: LayerDims) -> None:
        super().__init__()
        self.seed, self.layer = config.seed, dims.layer

    def outline(self, spec: SelectionSpec, keys: int) -> RandomScores:
        return RandomScores(torch.empty(1, keys, 0, device="meta"), keys, spec.heads)

    # Its number would make every layer a compiled block of its own.
    @torch.compiler.disable
    def forward(self, x_BTD: Tensor, seq: Sequence, spec: SelectionSpec) -> RandomScores:
        none, queries = x_BTD.new_zeros(*x_BTD.shape[:2], 0), x_BTD.shape[1]
        return RandomScores(none, queries, spec.heads, seq.q_start, self.seed, self.layer)


class StridedIndexer(BlockIndexer):
    """Every n-th block, spread over the whole past (Child et al. 2019, arXiv 1904.10509).

    stride 0 takes n from the budget. Raises ValueError for a negative stride.
    """

    def __init__(self, config: StridedIndexerConfig, dims: LayerDims) -> None:
        super().__init__()
        if config.stride < 0:
            raise ValueError(f"indexer.stride={config.stride} must be 0 or more")
        self.stride = config.stride

    def outline(self, spec: SelectionSpec, keys: int) -> StridedScores:
        return StridedScores(torch.empty(1, keys, 0, device="meta"), keys, spec.heads)

    def forward(self, x_BTD: Tensor, seq: Sequence, spec: SelectionSpec) -> StridedScores:
        none, queries = x_BTD.new_zeros(*x_BTD.shape[:2], 0), x_BTD.shape[1]
        return StridedScores(none, queries, spec.heads, seq.q_start, self.stride)
