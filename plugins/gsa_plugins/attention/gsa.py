"""Gated sparse attention: softmax over the keys an indexer selected (arXiv 2601.15305)."""

from typing import Any

import torch
from torch import Tensor

from gsa_kernels.selection import SelectionSpec
from gsa_kernels.sparse_attention.api import choose, sparse_attention
from gsa_platform.contracts import AttentionOutput, LayerDims, Sequence

from ..configs import GsaAttentionConfig
from ..dense import dense_attention
from .selected import SelectedAttention


class GatedSparseAttention(SelectedAttention):
    """Attends a Selection; with none (a dense warm-up step) it attends every key.

    Raises ValueError for a mode, granularity or impl that does not exist here.
    """

    def __init__(self, config: GsaAttentionConfig, dims: LayerDims) -> None:
        c = config
        super().__init__(c.mode, c.key_block, c.query_tile, c.selection_heads, dims)
        self.impl, self.head_dim = config.impl, dims.head_dim

    def describe(self, device_type: str) -> str:
        spec = SelectionSpec(self.key_block, self.query_tile)
        name, why = choose(self.impl, torch.device(device_type), spec, self.head_dim)
        return f"gsa: {self.granularity}; impl {name} ({why})"

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
        gate: Tensor | None = None,
    ) -> AttentionOutput:
        if selection is None:
            out = dense_attention(q_BTHE, k_BSKE, v_BSKE, seq)
            return AttentionOutput(out if gate is None else out * gate.to(out.dtype))
        result = sparse_attention(
            q_BTHE,
            k_BSKE,
            v_BSKE,
            selection,
            bias_BHQN=bias,
            gate_BTHE=gate,
            need_mass=need_mass,
            impl=self.impl,
        )
        return AttentionOutput(result.out_BTHE, result.mass_BHQN)
