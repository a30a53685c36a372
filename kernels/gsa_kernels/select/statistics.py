"""Statistics of a tile's candidate scores, from which controllers set budgets.

Each is over the candidates of one tile's anchor only: never over masked positions, other rows or
other samples, which would leak the future or mix the batch. 0 where there is no candidate.

    count      n, how many blocks may be chosen
    mean       of the scores
    variance   population variance
    max        largest score
    entropy    of p = score / sum(score) (negative scores count as 0), less its largest value
               log n: 0 for equal scores, below 0 otherwise, in nats
    histogram  candidates per bin of score, 8 bins an octave from 2^-24 to 2^8 [..., 256]; the
               first bin also holds everything below, the last everything above

Sums are taken in float64, so that their order (a chunk, one tile, a kernel) does not show. Those
of long rows of single keys are the kernels' (triton_statistics.py), whose order never changes.
"""

import torch
from torch import Tensor

from gsa_kernels.topk import comparable

STATISTICS = ("count", "mean", "variance", "max", "entropy", "histogram")
BINS = 256
TAIL = {"histogram": (BINS,)}  # dimensions after [B, H, Q]
_LOWEST = -24  # exponent of the first bin
_SHIFT = 20  # float32 bits below the three leading mantissa bits


def check_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names in a fixed order; ValueError for one that is not a statistic."""
    for name in names:
        if name not in STATISTICS:
            raise ValueError(f"statistic {name!r} is not one of {', '.join(STATISTICS)}")
    return tuple(name for name in STATISTICS if name in names)


def candidate_statistics(
    scores: Tensor, allowed: Tensor, names: tuple[str, ...]
) -> dict[str, Tensor]:
    """The statistics named, float32 [...] from scores [..., blocks] and who is a candidate."""
    if not names:
        return {}
    allowed = allowed.expand_as(scores)
    count = allowed.sum(-1)
    safe = count.clamp_min(1)
    scores = scores.float()
    found: dict[str, Tensor] = {}
    if "count" in names:
        found["count"] = count.float()
    if "mean" in names or "variance" in names:
        mean = (_sum(scores, allowed) / safe).float()
        if "mean" in names:
            found["mean"] = mean
        if "variance" in names:
            square = (scores - mean[..., None]).square_()
            found["variance"] = (_sum(square, allowed) / safe).float()
    if "max" in names:
        found["max"] = _largest(scores, allowed, count)
    if "entropy" in names:
        found["entropy"] = _entropy(scores, allowed, safe)
    if "histogram" in names:
        found["histogram"] = _histogram(scores, allowed)
    return found


def bin_values(device: torch.device | str | None = None) -> Tensor:
    """[BINS] float64: the score that each bin of a histogram stands for, its centre; 0 first."""
    index = torch.arange(BINS, dtype=torch.float64, device=device)
    octave = (index / 8).floor()
    value = 2.0 ** (octave + _LOWEST) * (1 + (index - 8 * octave + 0.5) / 8)
    value[0] = 0.0
    return value


def _sum(values: Tensor, allowed: Tensor) -> Tensor:
    return values.masked_fill(~allowed, 0).sum(-1, dtype=torch.float64)


def _largest(scores: Tensor, allowed: Tensor, count: Tensor) -> Tensor:
    if scores.shape[-1] == 0:
        return count.float()
    return scores.masked_fill(~allowed, -torch.inf).amax(-1).masked_fill(count == 0, 0)


def _entropy(scores: Tensor, allowed: Tensor, safe: Tensor) -> Tensor:
    positive = scores.clamp_min(0)
    mean = (_sum(positive, allowed) / safe).float()
    ratio = positive / mean.clamp_min(1e-30)[..., None]
    # log n - H = mean of r log r, where the r average 1: no term of r log r - r + 1 is negative,
    # so nearly equal scores do not cancel.
    gap = torch.xlogy(ratio, ratio) - ratio + 1
    return (-_sum(gap, allowed) / safe).float().masked_fill(mean <= 0, 0)


def _histogram(scores: Tensor, allowed: Tensor) -> Tensor:
    # The leading bits of a positive float32 are its exponent and first mantissa digits.
    bins = (comparable(scores).view(torch.int32) >> _SHIFT) - ((127 + _LOWEST) << 3)
    found = torch.zeros(*scores.shape[:-1], BINS, device=scores.device)
    return found.scatter_add_(-1, bins.clamp_(0, BINS - 1).long(), allowed.float())
