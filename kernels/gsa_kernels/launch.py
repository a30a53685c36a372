"""Launches of Triton kernels that look at their arguments once, not every time.

Triton's own launch derives from every argument what the compiled kernel may assume of it (type,
alignment, divisibility), which takes the host longer than the launch. Here the kernel compiled for
a key is kept; the key holds types, and of integers what Triton compiles for: one, multiples of 16,
those of 64 bits.

Multiply-adds are fused whatever Triton's default (Triton 3.10 will no longer): kernels that must
agree to the bit are compiled alike, and a softmax step costs one operation less.
"""

from typing import Any

import torch
from torch import Tensor

_MOST = 4096  # kernels kept
_kept: dict[Any, tuple[Any, tuple[Any, ...]]] = {}


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """kernel[grid](*args, **constants) for the current device.

    args: the arguments that are no constants, in order, tensors first; of tensor descriptors the
    tensors must be among them. Tensors not aligned to 16 bytes take Triton's way.
    """
    if not _keeps(args[0].device):
        kernel[grid](*args, **constants, enable_fp_fusion=True)
        return
    key: list[Any] = [id(kernel), args[0].device]
    addresses = 0
    for x in args:
        if type(x) is int:
            key.append(1 if x == 1 else (x & 15 == 0, -(1 << 31) <= x < 1 << 31))
        elif type(x) is float:  # of any value: and 1.0 must not find what was made for 1
            key.append(float)
        elif isinstance(x, Tensor):
            key.append(x.dtype)
            addresses |= x.data_ptr()
        elif not hasattr(x, "block_shape"):  # no descriptor
            key.append(x)
    found = None if addresses & 15 else (tuple(key), *constants.items())
    held = _kept.get(found)
    if held is None:
        compiled = kernel[grid](*args, **constants, enable_fp_fusion=True)
        if found is not None:
            if len(_kept) >= _MOST:
                _kept.clear()
            rest = tuple(constants[name] for name in kernel.arg_names[len(args) :])
            _kept[found] = compiled, rest
        return
    compiled, rest = held
    compiled[(*grid, 1, 1)](*args, *rest)


def _keeps(device: torch.device) -> bool:
    return device.type == "cuda"
