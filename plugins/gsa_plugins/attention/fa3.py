"""FlashAttention-3 where it is installed (github.com/Dao-AILab/flash-attention, folder hopper).

Its causal mask is aligned to the last key, so queries that continue a cache are right too.
"""

import importlib
import importlib.util
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gsa_platform.contracts import Sequence

from .documents import pack

_MODULES = ("flash_attn_interface", "flash_attn_3.flash_attn_interface")


def reason(device: torch.device) -> str:
    """Why FlashAttention-3 cannot run on this device; empty when it can."""
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if not _installed():
        return "needs the package flash_attn_3 (module flash_attn_interface), not installed"
    capability = torch.cuda.get_device_capability(device)
    if not (8, 0) <= capability <= (9, 0):
        return "needs a GPU of compute capability 8.0 to 9.0, not {}.{}".format(*capability)
    return ""


def attend(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, seq: Sequence) -> Tensor:
    """out_BTHE of causal attention inside documents; the queries are the last of the keys."""
    module = _module()
    if seq.doc_start_BS is None:
        out = module.flash_attn_func(q_BTHE, k_BSKE, v_BSKE, causal=True)
        return _first(out)
    packed = pack(q_BTHE, k_BSKE, v_BSKE, seq)
    out = module.flash_attn_varlen_func(
        packed.q_NHE,
        packed.k_MKE,
        packed.v_MKE,
        packed.cumulative(packed.q_lengths),
        packed.cumulative(packed.k_lengths),
        max(packed.q_lengths),
        max(packed.k_lengths),
        causal=True,
    )
    return _first(out).unflatten(0, q_BTHE.shape[:2])


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out  # older builds return the log-sum-exp too


@cache
def _installed() -> bool:
    for name in _MODULES:
        try:
            if importlib.util.find_spec(name) is not None:
                return True
        except ModuleNotFoundError:  # its package is absent
            continue
    return False


@cache
def _module() -> ModuleType:
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise ValueError("attention.backend=fa3 needs the package flash_attn_3, not installed")
