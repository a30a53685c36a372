"""Dense causal attention through PyTorch's scaled_dot_product_attention."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gsa_kernels.attention_mass import probe
from gsa_kernels.selection import SelectionSpec, tile_layout
from gsa_platform.contracts import Attention, AttentionOutput, LayerDims, Sequence

from .configs import DenseAttentionConfig

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
_ROWS = 512  # query rows per call where an explicit mask cannot be avoided
PROBED_TILES = 4
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

    # Indexes by numbers read from tensors, which a compiler would guard on.
    @torch.compiler.disable
    def probe(
        self, q_BTHE: Tensor, k_BSKE: Tensor, selection: Any, seq: Sequence
    ) -> dict[str, Tensor]:
        spec = SelectionSpec(PROBED_ROWS, PROBED_ROWS, PROBED_ROWS, 0)
        layout = tile_layout(
            spec, q_BTHE.shape[1], k_BSKE.shape[1], seq.q_start, seq.doc_start_BS, q_BTHE.device
        )
        tiles = spread(layout.n_tiles, PROBED_TILES)
        return vars(probe(q_BTHE, k_BSKE, layout, tiles, None, seq.doc_start_BS))


def spread(n: int, count: int, step: int = 0) -> list[int]:
    """`count` of the numbers 0 .. n-1, evenly spaced, shifted by step along the golden ratio."""
    count = min(n, count)
    shift = (step * 0.6180339887498949 + 0.5) % 1.0
    return sorted({int((i + shift) * n / count) for i in range(count)})


def dense_attention(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, seq: Sequence) -> Tensor:
    """out_BTHE of causal attention inside documents, in pieces that never hold a T x S tensor."""
    queries, keys = q_BTHE.shape[1], k_BSKE.shape[1]
    if seq.doc_start_BS is not None:
        return _by_document(q_BTHE, k_BSKE, v_BSKE, seq)
    if queries == keys:
        return _sdpa(q_BTHE, k_BSKE, v_BSKE, is_causal=True)
    pieces = []
    for low in range(0, queries, _ROWS):
        high = min(queries, low + _ROWS)
        end = seq.q_start + high
        position = torch.arange(seq.q_start + low, end, device=q_BTHE.device)
        mask = torch.arange(end, device=q_BTHE.device) <= position[:, None]
        args = (q_BTHE[:, low:high], k_BSKE[:, :end], v_BSKE[:, :end])
        pieces.append(_sdpa(*args, attn_mask=None if high - low == 1 else mask))
    return torch.cat(pieces, 1)


# Document lengths differ in every batch: compiled, they would be new shapes each time.
@torch.compiler.disable
def _by_document(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, seq: Sequence) -> Tensor:
    """One causal call per document of each sequence."""
    assert seq.doc_start_BS is not None
    out = []
    stop = seq.q_start + q_BTHE.shape[1]
    for b in range(q_BTHE.shape[0]):
        starts = [s for s in seq.doc_start_BS[b, :stop].unique().tolist() if s < stop]
        rows = []
        for start, end in zip(starts, [*starts[1:], stop], strict=True):
            if end <= seq.q_start:
                continue
            low = max(start, seq.q_start)
            piece = Sequence(q_start=low - start)
            part = slice(b, b + 1)
            rows.append(
                dense_attention(
                    q_BTHE[part, low - seq.q_start : end - seq.q_start],
                    k_BSKE[part, start:end],
                    v_BSKE[part, start:end],
                    piece,
                )
            )
        out.append(torch.cat(rows, 1))
    return torch.cat(out)


def _sdpa(
    q_BTHE: Tensor,
    k_BSKE: Tensor,
    v_BSKE: Tensor,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BSKE, v_BSKE))
    group = q.shape[1] // k.shape[1]
    if group > 1 and q.device.type != "cuda":
        # The fused CPU kernel knows no grouped heads; the unfused one would hold T x S.
        k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=group > 1
    )
    return out.transpose(1, 2)
