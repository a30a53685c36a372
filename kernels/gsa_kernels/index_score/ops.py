"""torch.library operators over the scoring kernels. Imports no triton until an operator runs."""

import torch
from torch import Tensor

from gsa_kernels.dispatch import undispatched

ALIGNED = 32  # rows of scores begin at multiples of 128 bytes


def _pool_keys(
    k: Tensor, docs: Tensor | None, block: int, parts: int, dtype: torch.dtype | None = None
) -> Tensor:
    """[B, S // block, parts, I] mean key of each whole block, as keys.pool_keys; no gradient.

    The mean is the sum of its parts, in `dtype` (16 bits; None: that of k); one part is float32.
    k [B, S, I], docs [B, S] integers; contiguous, but k along the batch.
    """
    from . import triton_launch

    return triton_launch.pool_keys(k, docs, block, parts, dtype)


pool_keys_operator = torch.library.custom_op("gsa::pool_keys", _pool_keys, mutates_args=())
pool_keys = undispatched(_pool_keys, pool_keys_operator)


@pool_keys_operator.register_fake
def _(k, docs, block, parts, dtype=None):  # type: ignore[no-untyped-def]
    dtype = torch.float32 if parts == 1 else dtype or k.dtype
    return k.new_empty((k.shape[0], k.shape[1] // block, parts, k.shape[2]), dtype=dtype)


def _block_scores(
    q: Tensor,
    k: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    docs: Tensor | None,
    sizes: list[int],
    tiles: list[int],
    scale: float,
    sigmoid: bool,
    heads: int,
    single: bool,
    running: Tensor | None = None,
    ratio: int = 1,
    edge_start: int = 0,
) -> Tensor:
    """[B, H, rows, stride] float32 scores of blocks at the anchors of query tiles; no gradient.

    q [B, T, J, I], k [B, N, parts, I] mean keys or (single: a block scores as the best of its
    keys) keys, weight [B, T, J], bias [J], docs [B, S]; contiguous, but k along the batch.
    sizes: C, R, window, sinks, q_start. tiles: the first one and the one after the last (absolute
    numbers) and the columns wanted; stride is at least that. What is no candidate of its row is
    -inf or not written.
    running [B, n, I], of positions edge_start ...: a column is a pooling block of `ratio` blocks,
    scored from its key in k, or, where it is the last before the local window, from the running
    one at its last position, which must be among these.
    """
    from . import triton_launch

    return triton_launch.block_scores(
        q,
        k,
        weight,
        bias,
        docs,
        sizes,
        tiles,
        scale,
        sigmoid,
        heads,
        single,
        running,
        ratio,
        edge_start,
    )


block_scores_operator = torch.library.custom_op(
    "gsa::block_scores", _block_scores, mutates_args=()
)
block_scores = undispatched(_block_scores, block_scores_operator)


@block_scores_operator.register_fake
def _(q, k, weight, bias, docs, sizes, tiles, scale, sigmoid, heads, *rest):  # type: ignore[no-untyped-def]
    stride = -(-tiles[2] // ALIGNED) * ALIGNED
    return q.new_empty((q.shape[0], heads, tiles[1] - tiles[0], stride), dtype=torch.float32)
