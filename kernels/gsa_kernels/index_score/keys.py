"""Keys of blocks: means that keep documents apart, and rows gathered by block number."""

import torch
from torch import Tensor


def pool_keys(k_BSI: Tensor, block: int, doc_start_BS: Tensor | None = None) -> Tensor:
    """Mean key of each whole block, [B, S // block, I], at least float32 where block > 1.

    A block that holds the end of one document and the start of another is the mean over the
    later document's keys only: queries that can select it belong to that document or a later one.
    """
    batch, keys, width = k_BSI.shape
    n = keys // block
    if block == 1:
        return k_BSI
    # Not in 16 bits: selection compares scores to 12.
    k = wide(k_BSI)[:, : n * block].view(batch, n, block, width)
    if doc_start_BS is None:
        return k.mean(2)
    position = torch.arange(n * block, device=k_BSI.device).view(n, block)
    start = doc_start_BS[:, block - 1 : n * block : block]
    keep = (position >= start[..., None]).to(k.dtype)[..., None]
    return (k * keep).sum(2) / keep.sum(2)


def wide(x: Tensor) -> Tensor:
    """At least float32: scores of 8 bits, as bfloat16 has, would tie most keys of a context."""
    return x if x.dtype == torch.float64 else x.float()


def own_document(
    block: int, n_blocks: int, doc_start_BS: Tensor | None, device: torch.device
) -> Tensor | None:
    """[B, n_blocks, block] bool: keys of the document that a block's last key belongs to."""
    if doc_start_BS is None:
        return None
    position = torch.arange(n_blocks * block, device=device).view(n_blocks, block)
    return position >= doc_start_BS[:, block - 1 : n_blocks * block : block, None]


def take(k_BSI: Tensor, index_BHTN: Tensor) -> Tensor:
    """[B, H, T, N, I]: rows of each sequence's keys."""
    batch, keys, width = k_BSI.shape
    offset = torch.arange(batch, device=k_BSI.device).view(-1, 1, 1, 1) * keys
    flat = (index_BHTN + offset).reshape(-1)
    shape = (batch, *index_BHTN.shape[1:], width)
    return k_BSI.reshape(batch * keys, width).index_select(0, flat).view(shape)
