"""Memory that is allocated and never written shows: it holds NaN, or integers out of range."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_EMPTY = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")


class PoisonedMemory(TorchDispatchMode):
    """Inside this context `torch.empty` and its relatives return NaN (integers: a number that is
    no index). What an operation allocates internally is its own affair and stays as it is."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in _EMPTY:
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                    _fill(leaf)
        return out


def _fill(tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(float("nan"))
    elif tensor.dtype != torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).max)
