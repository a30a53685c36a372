"""Attention over a Selection through PyTorch's FlexAttention (arXiv 2412.05496)."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gsa_platform.contracts import AttentionOutput, LayerDims, Sequence

from ..configs import FlexConfig
from ..dense import dense_attention
from .flex_eager import attend_mask
from .selected import SelectedAttention

IMPLEMENTATIONS = ("auto", "compiled", "eager")
CELLS = (64, 128, 256)
_SMALLEST_HEAD = 16  # of the compiled kernels


class FlexSelectedAttention(SelectedAttention):
    """Attends a Selection as a BlockMask; with none (a dense warm-up step) every key.

    Cells of `block` x `block` in which nothing is selected are skipped; inside the others the rule
    is exact, pair by pair, so the result is that of any other attention over the Selection, and
    the cost that of the cells: a choice finer than the cells costs more than its keys.

    impl compiled is FlexAttention's own kernel (on a CPU without a backward); eager reads the same
    mask in plain PyTorch at a cost of T x S, for CPUs and tests; auto takes compiled on CUDA.
    Raises ValueError for settings that do not exist and for single keys chosen by single queries.
    """

    def __init__(self, config: FlexConfig, dims: LayerDims) -> None:
        c = config
        super().__init__(c.mode, c.key_block, c.query_tile, c.selection_heads, dims)
        if self.mode == "token":
            raise ValueError(
                "attention.mode=token: a FlexAttention mask of single keys is T x S; choose block "
                "or tile"
            )
        if c.impl not in IMPLEMENTATIONS:
            choices = ", ".join(IMPLEMENTATIONS)
            raise ValueError(f"attention.impl={c.impl!r} is not one of {choices}")
        if c.block not in CELLS:
            choices = ", ".join(map(str, CELLS))
            raise ValueError(f"attention.block={c.block} is not one of {choices}")
        self.impl, self.block = c.impl, c.block

    def describe(self, device_type: str) -> str:
        name = self._choose(device_type, learns=True)
        why = "asked for"
        if self.impl == "auto":
            why = "FlexAttention" if name == "compiled" else "FlexAttention has no CPU backward"
        cells = f"cells of {self.block} x {self.block}"
        return f"flex: {self.granularity}; {cells}; impl {name} ({why})"

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
        if bias is not None:
            raise ValueError("attention=flex adds no bias to its logits: choose gsa")
        if selection is None:
            return AttentionOutput(dense_attention(q_BTHE, k_BSKE, v_BSKE, seq))
        q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BSKE, v_BSKE))
        k, v = k[:, :, : selection.n_keys], v[:, :, : selection.n_keys]
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        name = self._choose(q.device.type, learns)
        mask = selection.to_block_mask(self.block, heads=q.shape[1])
        scale = q.shape[-1] ** -0.5
        if name == "eager":
            with torch.autocast(q.device.type, enabled=False):  # it would undo the float32
                out = attend_mask(q, k, v, mask, scale)
        else:
            out = attend_compiled(q, k, v, mask, scale)
        return AttentionOutput(out.transpose(1, 2))

    def _choose(self, device_type: str, learns: bool) -> str:
        if self.impl == "compiled" and device_type == "cpu" and learns:
            raise ValueError(
                "attention.impl=compiled: FlexAttention has no backward on a CPU; choose eager or "
                "auto"
            )
        if self.impl == "auto":
            return "compiled" if device_type == "cuda" else "eager"
        return self.impl


def attend_compiled(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Any, scale: float
) -> Tensor:
    """out_BHTE by FlexAttention's compiled kernel."""
    width = q_BHTE.shape[-1]
    if width < _SMALLEST_HEAD:  # zeros change neither the logits nor the other outputs
        pad = (0, _SMALLEST_HEAD - width)
        q_BHTE, k_BKSE, v_BKSE = (
            torch.nn.functional.pad(x, pad) for x in (q_BHTE, k_BKSE, v_BKSE)
        )
    run = _kernel(q_BHTE.device.type, mask.BLOCK_SIZE[0] < 128)
    out = run(
        q_BHTE,
        k_BKSE,
        v_BKSE,
        block_mask=mask,
        scale=scale,
        enable_gqa=q_BHTE.shape[1] != k_BKSE.shape[1],
        # The kernel for short queries refuses some numbers of heads.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )
    return out[..., :width]


@cache
def _kernel(device_type: str, small: bool) -> Callable[..., Tensor]:
    """FlexAttention, compiled.

    small: the backward's default tiles are larger than the cells, so the compiler searches for
    others. fullgraph: past the limit of recompilations it raises, and does not fall back to T x S.
    """
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(
        flex_attention,
        fullgraph=True,
        # PyTorch's C++ for shapes that vary does not compile (2.13).
        dynamic=False if device_type == "cpu" else None,
        mode="max-autotune-no-cudagraphs" if small and device_type == "cuda" else None,
    )
