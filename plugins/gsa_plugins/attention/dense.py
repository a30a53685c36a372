"""Dense causal attention, with a choice of kernels."""

from typing import Any

import torch
from torch import Tensor

from gsa_platform.contracts import Attention, AttentionOutput, LayerDims, Sequence

from ..configs import DenseAttentionConfig
from ..dense import dense_attention
from . import sdpa, varlen
from .probes import probe_dense


class DenseAttention(Attention):
    """Every query attends every earlier key of its document. Memory is linear in T.

    backend: auto (PyTorch chooses, `describe` says what), cudnn, flash, efficient, math (holds
    T x S) or fa3. A backend asked for by name runs or is refused with ValueError.
    """

    def __init__(self, config: DenseAttentionConfig, dims: LayerDims) -> None:
        super().__init__()
        if config.backend not in sdpa.BACKENDS:
            choices = ", ".join(sdpa.BACKENDS)
            raise ValueError(f"attention.backend={config.backend!r} is not one of {choices}")
        self.backend, self.dims = config.backend, dims

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
        return AttentionOutput(dense_attention(q_BTHE, k_BSKE, v_BSKE, seq, self.backend))

    def describe(self, device_type: str) -> str:
        device = torch.device(device_type)
        sdpa.refuse(self.backend, device)
        if self.backend == "fa3":
            return "dense: FlashAttention-3"
        line = f"dense: PyTorch SDPA, backend {self.backend}"
        if self.backend == "auto":
            kinds = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
            took = [f"{sdpa.chosen(device, self.dims, d)} for {n}" for d, n in kinds.items()]
            line += f" ({', '.join(took)})"
        one = device.type == "cuda" and varlen.operator() and self.backend in ("auto", "flash")
        return f"{line}; documents: {'one varlen call' if one else 'one call each'}"

    def probe(
        self, q_BTHE: Tensor, k_BSKE: Tensor, selection: Any, seq: Sequence
    ) -> dict[str, Tensor]:
        return probe_dense(q_BTHE, k_BSKE, seq)
