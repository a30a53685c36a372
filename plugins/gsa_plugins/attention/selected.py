"""What every attention over a Selection shares: its granularity, and what diagnostics see."""

import torch
from torch import Tensor

from gsa_kernels.attention_mass import probe
from gsa_kernels.selection import Selection, SelectionSpec
from gsa_platform.contracts import Attention, LayerDims, Sequence, Sparsity

from ..dense import PROBED_TILES, spread
from ..granularity import granularity


class SelectedAttention(Attention):
    """Base of the attentions that take a Selection: mode, C keys, R queries, selection heads.

    Raises ValueError for a mode or granularity that does not exist.
    """

    def __init__(
        self, mode: str, key_block: int, query_tile: int, selection_heads: str, dims: LayerDims
    ) -> None:
        super().__init__()
        self.mode = mode
        self.key_block, self.query_tile = granularity(mode, key_block, query_tile)
        if selection_heads not in ("shared", "kv"):
            raise ValueError(f"attention.selection_heads={selection_heads!r}: choose shared or kv")
        self.selection_heads = dims.n_kv_heads if selection_heads == "kv" else 1

    @property
    def granularity(self) -> str:
        return f"{self.mode} mode, C={self.key_block} keys, R={self.query_tile} queries"

    def selection_spec(self, sparsity: Sparsity) -> SelectionSpec:
        return SelectionSpec(
            self.key_block, self.query_tile, sparsity.window, sparsity.sinks, self.selection_heads
        )

    @torch.compiler.disable
    def probe(
        self, q_BTHE: Tensor, k_BSKE: Tensor, selection: Selection | None, seq: Sequence
    ) -> dict[str, Tensor]:
        if selection is None:
            return {}
        count = max(PROBED_TILES, 64 // self.query_tile)
        tiles = spread(selection.layout.n_tiles, count)
        return vars(probe(q_BTHE, k_BSKE, selection.layout, tiles, selection, seq.doc_start_BS))
