"""Index keys of one byte a channel (FP8, e4m3), as a decoding cache holds them.

An e4m3 number has 4 significant bits from 2^-6 to 448 (fewer down to 2^-9). Channels of index keys
start with unit variance, near the middle of that range, where a scale that is a power of two would
change no digit: there is none. Channels beyond 448 are cut off.
"""

from typing import Any

import torch
from torch import Tensor

KEY_DTYPES = ("auto", "fp8")
FP8 = torch.float8_e4m3fn
LARGEST = 448.0


class _Rounded(torch.autograd.Function):
    """The gradient passes as if nothing had been rounded."""

    @staticmethod
    def forward(ctx: Any, k: Tensor) -> Tensor:
        return _packed(k).to(k.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _packed(k: Tensor) -> Tensor:
    # Some versions of PyTorch make NaN of what is too large.
    return k.clamp(-LARGEST, LARGEST).to(FP8)


# Compiled code has no such conversion on devices before sm_89.
@torch.compiler.disable
def fp8_keys(k_BSI: Tensor) -> Tensor:
    """Keys rounded to FP8, of that type, or, where gradients are recorded, of their own type: then
    the gradient reaches the keys unrounded, and the values are what decoding would see."""
    if torch.is_grad_enabled():
        rounded = _Rounded.apply(k_BSI)
        assert isinstance(rounded, Tensor)
        return rounded
    return _packed(k_BSI)


def product_dtype(q: Tensor, k: Tensor) -> torch.dtype:
    """The type in which keys k are multiplied with queries q: that of q for FP8 keys."""
    return q.dtype if k.dtype == FP8 else k.dtype
