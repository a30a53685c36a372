"""Dense and sliding-window attention through xformers' memory_efficient_attention.

github.com/facebookresearch/xformers, xformers/ops/fmha. CUDA only.
"""

from typing import Any

import torch
from torch import Tensor

from gsa_platform.contracts import Attention, AttentionOutput, LayerDims, Sequence
from gsa_platform.model.flops import mean_keys

from ..configs import XformersConfig
from . import xformers_ops
from .documents import Packed, pack
from .probes import probe_dense, probe_window


class XformersAttention(Attention):
    """Every query attends every earlier key of its document, or its `window` most recent keys.

    Raises ValueError for a negative window, and on a device that xformers has no operator for.
    """

    def __init__(self, config: XformersConfig, dims: LayerDims) -> None:
        super().__init__()
        if config.window < 0:
            raise ValueError(f"attention.window={config.window} must be at least 0 (0: all keys)")
        self.window = config.window

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
        return AttentionOutput(
            memory_efficient_attention(q_BTHE, k_BSKE, v_BSKE, seq, self.window)
        )

    def describe(self, device_type: str) -> str:
        if why := xformers_ops.reason(device_type):
            raise ValueError(why)
        usable = ", ".join(n for n, why in xformers_ops.operators().items() if not why)
        keys = f"window {self.window}" if self.window else "every causal key"
        return (
            f"xformers: {keys}; memory_efficient_attention takes the first that fits of {usable}"
        )

    def mean_keys(self, context: int) -> float | None:
        return mean_keys(context, self.window) if self.window else None

    def probe(
        self, q_BTHE: Tensor, k_BSKE: Tensor, selection: Any, seq: Sequence
    ) -> dict[str, Tensor]:
        if self.window:
            return probe_window(q_BTHE, k_BSKE, seq, self.window)
        return probe_dense(q_BTHE, k_BSKE, seq)


def memory_efficient_attention(
    q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, seq: Sequence, window: int = 0
) -> Tensor:
    """out_BTHE of causal attention inside documents; window: most recent keys only (0: all)."""
    if why := xformers_ops.reason(q_BTHE.device.type):
        raise ValueError(why)
    queries = q_BTHE.shape[1]
    near = slice(max(0, seq.q_start - window + 1) if window else 0, seq.q_start + queries)
    k_BSKE, v_BSKE = k_BSKE[:, near], v_BSKE[:, near]
    docs = seq.doc_start_BS
    if docs is not None:
        docs = (docs[:, near] - near.start).clamp_min(0)
    # cutlass, the only operator in float32, has no backward for a window outside documents.
    if docs is None and not (window and q_BTHE.dtype == torch.float32):
        bias = plain_bias(queries, k_BSKE.shape[1], window)
        return _call(q_BTHE, k_BSKE, v_BSKE, bias)
    packed = pack(q_BTHE, k_BSKE, v_BSKE, Sequence(seq.q_start - near.start, docs))
    q, k, v = packed.q_NHE[None], packed.k_MKE[None], packed.v_MKE[None]
    return _call(q, k, v, packed_bias(packed, window))[0].unflatten(0, q_BTHE.shape[:2])


def plain_bias(queries: int, keys: int, window: int) -> Any:
    """xformers' mask for sequences without documents; the queries are the last of the keys."""
    masks = xformers_ops.fmha().attn_bias
    if window:
        return masks.LocalAttentionFromBottomRightMask(window - 1, 0)
    if queries == keys:
        return masks.LowerTriangularMask()
    return masks.LowerTriangularFromBottomRightMask()


def packed_bias(packed: Packed, window: int) -> Any:
    """xformers' mask for runs laid end to end, causal inside each."""
    blocks = xformers_ops.fmha().attn_bias.BlockDiagonalMask.from_seqlens(
        packed.q_lengths, packed.k_lengths, device=packed.q_NHE.device
    )
    if packed.q_lengths == packed.k_lengths:  # the forms that have a backward in float32
        return blocks.make_local_attention(window) if window else blocks.make_causal()
    if window:
        return blocks.make_local_attention_from_bottomright(window)
    return blocks.make_causal_from_bottomright()


def _call(q: Tensor, k: Tensor, v: Tensor, bias: Any) -> Tensor:
    """[B, T, H, E]; key heads are viewed as groups without gradients, and repeated with them,
    since xformers has grouped heads in the forward pass only."""
    heads, kv_heads = q.shape[2], k.shape[2]
    group = heads // kv_heads
    run = xformers_ops.fmha().memory_efficient_attention
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if group == 1 or learns or q.dtype == torch.float32:
        k, v = (x.repeat_interleave(group, 2) if group > 1 else x for x in (k, v))
        return run(q, k, v, attn_bias=bias)
    k, v = (x[:, :, :, None].expand(-1, -1, -1, group, -1) for x in (k, v))
    return run(q.unflatten(2, (kv_heads, group)), k, v, attn_bias=bias).flatten(2, 3)
