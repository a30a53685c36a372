"""torch.library operators over the kernels of the training signals. Imports no triton until an
operator runs.
"""

import torch
from torch import Tensor

from gsa_kernels.dispatch import differentiable, undispatched


def _block_mass(
    q: Tensor, k: Tensor, tiles: Tensor, docs: Tensor | None, sizes: list[int]
) -> Tensor:
    """[B, Hs, n, blocks] float32: full attention on each key block, mean over a tile's queries and
    the heads that share a selection; 0 beyond the tile. sizes: C, R, q_start, Hs. All contiguous;
    tiles and docs: any integers. No gradient.
    """
    from . import triton_launch

    return triton_launch.block_mass(q, k, tiles, docs, sizes)


block_mass_operator = torch.library.custom_op("gsa::block_mass", _block_mass, mutates_args=())
block_mass = undispatched(_block_mass, block_mass_operator)


@block_mass_operator.register_fake
def _(q, k, tiles, docs, sizes):  # type: ignore[no-untyped-def]
    shape = (q.shape[0], sizes[3], tiles.shape[0], -(-k.shape[1] // sizes[0]))
    return q.new_empty(shape, dtype=torch.float32)


def _candidate_blocks(
    tiles: Tensor, docs: Tensor | None, batch: int, keys: int, sizes: list[int]
) -> Tensor:
    """[B, Hs, n, keys // C] int32: the number of each block that the tiles may choose, else -1.

    sizes: C, R, window, sinks, q_start, Hs.
    """
    from . import triton_launch

    return triton_launch.candidate_blocks(tiles, docs, batch, keys, sizes)


candidate_blocks_operator = torch.library.custom_op(
    "gsa::candidate_blocks", _candidate_blocks, mutates_args=()
)
candidate_blocks = undispatched(_candidate_blocks, candidate_blocks_operator)


@candidate_blocks_operator.register_fake
def _(tiles, docs, batch, keys, sizes):  # type: ignore[no-untyped-def]
    shape = (batch, sizes[5], tiles.shape[0], keys // sizes[0])
    return tiles.new_empty(shape, dtype=torch.int32)


def _mean_kl(scores: Tensor, mass: Tensor, log: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(mean loss of the rows with two slots or more, d sum of losses / d scores, rows); -inf
    scores are empty slots. rows [] counts as 1 where there is none.

    float32, contiguous, N > 0. The loss's gradient reaches the scores; mass is a target.
    """
    from . import triton_launch

    lines, grad = triton_launch.kl_rows(scores, mass, log, eps)
    loss, rows = lines.flatten(1).sum(1).unbind()
    rows = rows.clamp_min(1)
    return loss / rows, grad, rows


mean_kl_operator = torch.library.custom_op("gsa::mean_kl", _mean_kl, mutates_args=())


@mean_kl_operator.register_fake
def _(scores, mass, log, eps):  # type: ignore[no-untyped-def]
    return scores.new_empty(()), torch.empty_like(scores), scores.new_empty(())


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, dloss, *_):  # type: ignore[no-untyped-def]
    grad, rows = ctx.saved_tensors
    return None if dloss is None else grad * (dloss / rows), None, None, None


mean_kl = differentiable(_mean_kl, mean_kl_operator, _setup, _gradients, _gradients)
