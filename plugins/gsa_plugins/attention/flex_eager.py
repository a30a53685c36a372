"""A FlexAttention BlockMask interpreted in plain PyTorch: forward and backward on any device.

For CPUs, where FlexAttention has no backward, and for tests. It reads the same mask: cells that
are absent, full, or subject to the rule. Cost grows with T x S; memory is linear, since one row of
cells is held at a time and computed again in the backward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def attend_mask(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Any, scale: float) -> Tensor:
    """out_BHTE of softmax attention over the pairs of a BlockMask.

    float64 stays; everything else is computed in float32.
    """
    cells = [
        _cells(mask.kv_num_blocks, mask.kv_indices),
        _cells(mask.full_kv_num_blocks, mask.full_kv_indices),
    ]
    dtype = torch.float64 if q_BHTE.dtype == torch.float64 else torch.float32
    group = q_BHTE.shape[1] // k_BKSE.shape[1]
    q, k, v = q_BHTE.to(dtype) * scale, k_BKSE.to(dtype), v_BKSE.to(dtype)
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    out = []
    for i, rows in enumerate(q.split(mask.BLOCK_SIZE[0], 2)):
        args = (rows, k, v, mask, cells, i)
        row = checkpoint(_row, *args, use_reentrant=False) if learns else _row(*args)
        out.append(row)
    return torch.cat(out, 2).to(q_BHTE.dtype)


def _cells(count: Tensor, order: Tensor) -> Tensor:
    """[B, H, rows, columns] bool from the number of cells in each row and their columns."""
    listed = torch.arange(order.shape[-1], device=order.device) < count[..., None]
    cells = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
    return cells.scatter(-1, order.long(), listed)


def _row(q: Tensor, k: Tensor, v: Tensor, mask: Any, cells: list[Tensor], i: int) -> Tensor:
    """Attention of one row of cells; q [B, H, rows, E] is scaled."""
    height, width = mask.BLOCK_SIZE
    keys = k.shape[2]
    partial, full = (x[:, :, i].repeat_interleave(width, -1)[..., None, :keys] for x in cells)
    position = i * height + torch.arange(q.shape[2], device=q.device)
    grid = torch.meshgrid(
        *(torch.arange(n, device=q.device) for n in partial.shape[:2]), indexing="ij"
    )
    b, h = (x[..., None, None] for x in grid)
    key = torch.arange(keys, device=q.device)
    keep = full | (partial & mask.mask_mod(b, h, position[:, None], key))
    logits = (q @ k.transpose(2, 3)).masked_fill(~keep, -torch.inf)
    return logits.softmax(-1) @ v
