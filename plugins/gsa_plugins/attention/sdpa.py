"""The kernels behind torch.nn.functional.scaled_dot_product_attention, by name.

flash, efficient and cudnn keep memory linear in T; math holds the whole T x S matrix and serves
as an oracle. flash exists on a CPU too; efficient and cudnn need CUDA.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gsa_platform.contracts import LayerDims

from . import fa3

HALF = (torch.bfloat16, torch.float16)
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
BACKENDS = ("auto", *KERNELS, "fa3")
_ROWS = 512  # query rows per call where an explicit mask cannot be avoided


def reasons(device: torch.device, dtype: torch.dtype | None = None) -> dict[str, str]:
    """Each backend with "" if it runs on this device (in this dtype), else the reason why not."""
    cuda = "" if device.type == "cuda" else f"needs a CUDA device, not {device.type}"
    half = ""
    if dtype is not None and dtype not in HALF:
        half = f"needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    return {
        "auto": "",
        "cudnn": cuda or half,
        "flash": half if device.type == "cuda" else "",
        "efficient": cuda,
        "math": "",
        "fa3": fa3.reason(device) or half,
    }


def refuse(backend: str, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Raise ValueError if a backend asked for by name is unknown or cannot run here."""
    if backend not in BACKENDS:
        raise ValueError(f"attention.backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return
    found = reasons(device, dtype)
    if found[backend]:
        usable = ", ".join(name for name, why in found.items() if not why)
        raise ValueError(f"attention.backend={backend} {found[backend]}; usable here: {usable}")


def chosen(device: torch.device, dims: LayerDims, dtype: torch.dtype) -> str:
    """The kernel PyTorch takes for causal attention of this layer when it may choose."""
    group = dims.n_heads // dims.n_kv_heads
    q, k, v = (
        torch.empty(1, n, 256, dims.head_dim, dtype=dtype, device=device, requires_grad=True)
        for n in (dims.n_heads, dims.n_kv_heads, dims.n_kv_heads)
    )
    if group > 1 and not _grouped("auto", q, False):
        k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
    index = torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=group > 1)
    return next((n for n, kernel in KERNELS.items() if kernel.value == index), "no kernel")


def attend(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, backend: str = "auto") -> Tensor:
    """out_BTHE of causal attention; the queries are the last T of the S keys."""
    queries, keys = q_BTHE.shape[1], k_BSKE.shape[1]
    if queries in (1, keys):
        return call(q_BTHE, k_BSKE, v_BSKE, backend, is_causal=queries > 1)
    pieces = []
    for low in range(0, queries, _ROWS):
        high = min(queries, low + _ROWS)
        end = keys - queries + high
        position = torch.arange(keys - queries + low, end, device=q_BTHE.device)
        mask = torch.arange(end, device=q_BTHE.device) <= position[:, None]
        args = (q_BTHE[:, low:high], k_BSKE[:, :end], v_BSKE[:, :end])
        pieces.append(call(*args, backend, attn_mask=mask))
    return torch.cat(pieces, 1)


def call(
    q_BTHE: Tensor,
    k_BSKE: Tensor,
    v_BSKE: Tensor,
    backend: str = "auto",
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """scaled_dot_product_attention on this project's layout, with the kernel named."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BSKE, v_BSKE))
    group = q.shape[1] // k.shape[1]
    if group > 1 and not _grouped(backend, q, attn_mask is not None):
        k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
    with _kernel(backend):
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=group > 1
        )
    return out.transpose(1, 2)


def _grouped(backend: str, q: Tensor, masked: bool) -> bool:
    """Whether a fused kernel takes fewer key heads than query heads.

    Elsewhere enable_gqa falls to the math kernel, which would hold T x S.
    """
    fused = backend in ("auto", "flash", "cudnn")
    return fused and q.device.type == "cuda" and q.dtype in HALF and not masked


def _kernel(backend: str) -> AbstractContextManager[None]:
    return nullcontext() if backend == "auto" else sdpa_kernel(KERNELS[backend])
