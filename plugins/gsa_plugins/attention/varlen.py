"""PyTorch's varlen attention: one flash-attention call for all documents of a batch.

torch.nn.attention.varlen; CUDA, bfloat16 and float16. Its causal mask is aligned to the last key
of each run, so queries that continue a cache are right too.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .documents import Packed

_HALF = (torch.bfloat16, torch.float16)


@cache
def operator() -> Callable[..., Any] | None:
    """torch.nn.attention.varlen.varlen_attn, or None where this PyTorch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def usable(q: Tensor) -> bool:
    """Whether the kernel takes queries of this device, dtype and width."""
    if q.device.type != "cuda" or q.dtype not in _HALF or q.shape[-1] > 256 or q.shape[-1] % 8:
        return False
    return operator() is not None and torch.cuda.get_device_capability(q.device) >= (8, 0)


def attend(packed: Packed, window: int = 0) -> Tensor:
    """out_NHE of causal attention inside each run; window: most recent keys only (0: all)."""
    run = operator()
    assert run is not None
    known = inspect.signature(run).parameters
    k, v = packed.k_MKE, packed.v_MKE
    group = packed.q_NHE.shape[1] // k.shape[1]
    options: dict[str, Any] = {}
    if "enable_gqa" in known:
        options["enable_gqa"] = group > 1
    elif group > 1:  # versions that say nothing of grouped heads
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    if "window_size" in known:
        options["window_size"] = (window - 1 if window else -1, 0)
    else:
        assert not window
        options["is_causal"] = True
    return run(
        packed.q_NHE,
        k,
        v,
        packed.cumulative(packed.q_lengths),
        packed.cumulative(packed.k_lengths),
        max(packed.q_lengths),
        max(packed.k_lengths),
        **options,
    )


def windows() -> bool:
    """Whether this PyTorch's varlen attention knows sliding windows."""
    run = operator()
    return run is not None and "window_size" in inspect.signature(run).parameters
