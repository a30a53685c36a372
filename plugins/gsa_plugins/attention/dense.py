"""Dense causal attention through PyTorch's scaled_dot_product_attention."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gsa_kernels.attention_mass import probe
from gsa_kernels.selection import SelectionSpec, tile_layout
from gsa_platform.contracts import Attention, AttentionOutput, LayerDims, Sequence

from ..configs import DenseAttentionConfig
from ..dense import PROBED_TILES, dense_attention, spread

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
PROBED_ROWS = 64


class DenseAttention(Attention):
    """Every query attends every earlier key of its document. Memory is linear in T."""

    def __init__(self, config: DenseAttentionConfig, dims: LayerDims) -> None:
        super().__init__()
        if config.backend != "auto" and config.backend not in BACKENDS:
            choices = ", ".join(["auto", *BACKENDS])
            raise ValueError(f"attention.backend={config.backend!r} is not one of {choices}")
        self.backend = config.backend

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
        with self._kernel():
            return AttentionOutput(dense_attention(q_BTHE, k_BSKE, v_BSKE, seq))

    def _kernel(self) -> AbstractContextManager[None]:
        return nullcontext() if self.backend == "auto" else sdpa_kernel(BACKENDS[self.backend])

    def describe(self, device_type: str) -> str:
        return f"dense: PyTorch SDPA, backend {self.backend}"

    def probe(
        self, q_BTHE: Tensor, k_BSKE: Tensor, selection: Any, seq: Sequence
    ) -> dict[str, Tensor]:
        spec = SelectionSpec(PROBED_ROWS, PROBED_ROWS, PROBED_ROWS, 0)
        layout = tile_layout(
            spec, q_BTHE.shape[1], k_BSKE.shape[1], seq.q_start, seq.doc_start_BS, q_BTHE.device
        )
        tiles = spread(layout.n_tiles, PROBED_TILES)
        return vars(probe(q_BTHE, k_BSKE, layout, tiles, None, seq.doc_start_BS))
