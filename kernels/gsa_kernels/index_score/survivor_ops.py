"""torch.library operators over the kernels of coarse-to-fine scores. Imports no triton until an
operator runs.
"""

import torch
from torch import Tensor

from gsa_kernels.dispatch import undispatched


def _running_pool(
    k: Tensor, docs: Tensor | None, pool: int, pooling: str, dtype: torch.dtype | None = None
) -> Tensor:
    """[B, S, I] keys pooled up to each position, as pooled.running_pool; no gradient.

    pooling "bound": [B, S, 2 I], the largest and then the smallest value of each channel.
    dtype: of the result; None: that of k. k [B, S, I], docs [B, S] integers; contiguous, but k
    along the batch.
    """
    from . import survivor_launch

    return survivor_launch.running_pool(k, docs, pool, pooling, dtype)


running_pool_operator = torch.library.custom_op(
    "gsa::running_pool", _running_pool, mutates_args=()
)
running_pool = undispatched(_running_pool, running_pool_operator)


@running_pool_operator.register_fake
def _(k, docs, pool, pooling, dtype=None):  # type: ignore[no-untyped-def]
    width = k.shape[2] * (2 if pooling == "bound" else 1)
    return k.new_empty((*k.shape[:2], width), dtype=dtype)


def _survivor_scores(
    q: Tensor,
    k: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    docs: Tensor | None,
    lists: Tensor,
    sizes: list[int],
    first_tile: int,
    scale: float,
    sigmoid: bool,
    single: bool,
) -> Tensor:
    """[B, H, rows, P * ratio] float32 scores of the blocks in listed pooling blocks; no gradient.

    q, k, weight, bias, docs and single as in ops.block_scores. lists [B, H, rows, P] int32:
    pooling blocks of `ratio` blocks each, ascending, -1 last. sizes: C, R, window, sinks, q_start,
    ratio. Entry n is block n % ratio of pooling block lists[n // ratio], -inf if no candidate. All
    contiguous, but k along the batch; rows and P above 0.
    """
    from . import survivor_launch

    return survivor_launch.survivor_scores(
        q, k, weight, bias, docs, lists, sizes, first_tile, scale, sigmoid, single
    )


survivor_scores_operator = torch.library.custom_op(
    "gsa::survivor_scores", _survivor_scores, mutates_args=()
)
survivor_scores = undispatched(_survivor_scores, survivor_scores_operator)


@survivor_scores_operator.register_fake
def _(q, k, weight, bias, docs, lists, sizes, first_tile, scale, sigmoid, single):  # type: ignore[no-untyped-def]
    shape = (*lists.shape[:3], lists.shape[3] * sizes[5])
    return q.new_empty(shape, dtype=torch.float32)
