"""Exact top-k of scores, with ties that decoding breaks as training does."""

import torch
from torch import Tensor


def comparable(scores: Tensor) -> Tensor:
    """Scores as selection compares them: float32 rounded to 12 significant bits (0.02 %).

    Two equal keys (a repeated token in the first layer) have equal scores only up to rounding,
    which differs with the shape of a matrix product: unrounded, decoding one token at a time would
    choose another of them than one pass over the sequence does.
    """
    scores = scores.float().contiguous()
    rounded = (scores.view(torch.int32) + (1 << 11)) & ~((1 << 12) - 1)
    # The NaN that a GPU makes (all bits set) would overflow to a zero.
    return torch.where(scores.isnan(), scores, rounded.view(torch.float32))


def top_blocks(scores: Tensor, wanted: Tensor, width: int) -> Tensor:
    """[..., width] int32 columns of the `wanted` largest scores, ascending, padded with -1.

    Ties go to the lowest column; -inf is never chosen. Raises ValueError on NaN (a CUDA device
    asserts instead, since the host does not wait for it).
    """
    best = scores.topk(width, -1).values
    refuse_nan(best.isnan().any().logical_not())
    wanted = torch.minimum(wanted, (best > -torch.inf).sum(-1))
    threshold = best.gather(-1, (wanted - 1).clamp_min(0)[..., None])
    above = scores > threshold
    ties = scores == threshold
    room = wanted[..., None] - above.sum(-1, keepdim=True)
    keep = (above | (ties & (ties.cumsum(-1) <= room))) & (wanted[..., None] > 0)
    place = keep.cumsum(-1) - 1
    out = torch.full((*scores.shape[:-1], width + 1), -1, dtype=torch.int32, device=scores.device)
    column = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)
    place = place.masked_fill(~keep, width)
    out.scatter_(-1, place, column.expand_as(scores))
    return out[..., :width]


def refuse_nan(fine: Tensor) -> None:
    """Raise ValueError unless `fine` (one element) is true; a CUDA device asserts instead."""
    refuse_unless(fine, "index scores are not finite (NaN): lower the learning rate")


def refuse_unless(fine: Tensor, text: str) -> None:
    """As refuse_nan, for any reason."""
    if fine.device.type == "cuda":
        torch._assert_async(fine, text)
    elif not fine:
        raise ValueError(text)
