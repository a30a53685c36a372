"""torch.library operators over the kernels of the training signals. Imports no triton until an
operator runs.
"""

import torch
from torch import Tensor


@torch.library.custom_op("gsa::block_mass", mutates_args=())
def block_mass(
    q: Tensor, k: Tensor, tiles: Tensor, docs: Tensor | None, sizes: list[int]
) -> Tensor:
    """[B, Hs, n, blocks] float32: full attention on each key block, mean over a tile's queries and
    the heads that share a selection; 0 beyond the tile. sizes: C, R, q_start, Hs. All contiguous;
    tiles and docs: any integers. No gradient.
    """
    from . import triton_launch

    return triton_launch.block_mass(q, k, tiles, docs, sizes)


@block_mass.register_fake
def _(q, k, tiles, docs, sizes):  # type: ignore[no-untyped-def]
    shape = (q.shape[0], sizes[3], tiles.shape[0], -(-k.shape[1] // sizes[0]))
    return q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("gsa::candidate_blocks", mutates_args=())
def candidate_blocks(
    tiles: Tensor, docs: Tensor | None, batch: int, keys: int, sizes: list[int]
) -> Tensor:
    """[B, Hs, n, keys // C] int32: the number of each block that the tiles may choose, else -1.

    sizes: C, R, window, sinks, q_start, Hs.
    """
    from . import triton_launch

    return triton_launch.candidate_blocks(tiles, docs, batch, keys, sizes)


@candidate_blocks.register_fake
def _(tiles, docs, batch, keys, sizes):  # type: ignore[no-untyped-def]
    shape = (batch, sizes[5], tiles.shape[0], keys // sizes[0])
    return tiles.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op("gsa::kl_rows", mutates_args=())
def kl_rows(scores: Tensor, mass: Tensor, log: bool, eps: float) -> tuple[Tensor, Tensor]:
    """(loss and count [2, B, H, Q], d loss / d scores); -inf scores are empty slots.

    Rows with fewer than two slots count as 0. float32, contiguous, N > 0. The loss's gradient
    reaches the scores; mass is a target.
    """
    from . import triton_launch

    return triton_launch.kl_rows(scores, mass, log, eps)


@kl_rows.register_fake
def _(scores, mass, log, eps):  # type: ignore[no-untyped-def]
    return scores.new_empty((2, *scores.shape[:-1])), torch.empty_like(scores)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, dloss, _):  # type: ignore[no-untyped-def]
    (grad,) = ctx.saved_tensors
    return grad * dloss[0, ..., None], None, None, None


kl_rows.register_autograd(_gradients, setup_context=_setup)
