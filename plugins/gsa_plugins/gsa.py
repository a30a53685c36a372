"""Gated sparse attention: softmax over the keys an indexer selected (arXiv 2601.15305)."""

from typing import Any

import torch
from torch import Tensor

from gsa_kernels.attention_mass import probe
from gsa_kernels.selection import SelectionSpec
from gsa_kernels.sparse_attention.api import choose, sparse_attention
from gsa_platform.contracts import Attention, AttentionOutput, LayerDims, Sequence, Sparsity

from .configs import GsaAttentionConfig
from .dense import PROBED_TILES, dense_attention, spread
from .granularity import granularity


class GatedSparseAttention(Attention):
    """Attends a Selection; with none (a dense warm-up step) it attends every key.

    Raises ValueError for a mode, granularity or impl that does not exist here.
    """

    def __init__(self, config: GsaAttentionConfig, dims: LayerDims) -> None:
        super().__init__()
        self.mode = config.mode
        self.key_block, self.query_tile = granularity(
            config.mode, config.key_block, config.query_tile
        )
        if config.selection_heads not in ("shared", "kv"):
            raise ValueError(
                f"attention.selection_heads={config.selection_heads!r}: choose shared or kv"
            )
        self.selection_heads = dims.n_kv_heads if config.selection_heads == "kv" else 1
        self.impl, self.head_dim = config.impl, dims.head_dim

    def selection_spec(self, sparsity: Sparsity) -> SelectionSpec:
        return SelectionSpec(
            self.key_block, self.query_tile, sparsity.window, sparsity.sinks, self.selection_heads
        )

    def describe(self, device_type: str) -> str:
        spec = SelectionSpec(self.key_block, self.query_tile)
        name, why = choose(self.impl, torch.device(device_type), spec, self.head_dim)
        shape = f"{self.mode} mode, C={self.key_block} keys, R={self.query_tile} queries"
        return f"gsa: {shape}; impl {name} ({why})"

    # The eager path is a Python loop over chunks: tracing it would unroll thousands of steps.
    @torch.compiler.disable
    def forward(
        self,
        q_BTHE: Tensor,
        k_BSKE: Tensor,
        v_BSKE: Tensor,
        selection: Any,
        seq: Sequence,
        bias: Tensor | None = None,
        need_mass: bool = False,
    ) -> AttentionOutput:
        if selection is None:
            return AttentionOutput(dense_attention(q_BTHE, k_BSKE, v_BSKE, seq))
        result = sparse_attention(
            q_BTHE,
            k_BSKE,
            v_BSKE,
            selection,
            bias_BHQN=bias,
            need_mass=need_mass,
            impl=self.impl,
        )
        return AttentionOutput(result.out_BTHE, result.mass_BHQN)

    @torch.compiler.disable
    def probe(
        self, q_BTHE: Tensor, k_BSKE: Tensor, selection: Any, seq: Sequence
    ) -> dict[str, Tensor]:
        if selection is None:
            return {}
        layout = selection.layout
        count = max(PROBED_TILES, 64 // self.query_tile)
        tiles = spread(layout.n_tiles, count)
        return vars(probe(q_BTHE, k_BSKE, layout, tiles, selection, seq.doc_start_BS))
