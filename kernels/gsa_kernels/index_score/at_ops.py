"""torch.library operators over the kernels that score listed blocks. Imports no triton until an
operator runs.
"""

from functools import partial

import torch
from torch import Tensor

from gsa_kernels.dispatch import differentiable


def _scores(
    q: Tensor,
    keys: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    blocks: Tensor,
    tiles: Tensor | None,
    r: int,
    scale: float,
    sigmoid: bool,
    start: int = -1,
) -> Tensor:
    """[B, Hs, Q, N] float32 scores of blocks [B, Hs, Q, N], -inf where those are negative.

    q [B, T, J, I], keys [B, M, I], weight [B, T, J], bias [J]. Line i scores with row i R, or
    tiles[i] R where tiles [Q] are given. N and M above 0, all contiguous, at most float32.
    start: position of row 0 where the lists are a selection's and of single keys: ascending, -1
    last, no key after its row. Then the backward may be faster. Else negative.
    """
    from . import at_launch

    return at_launch.scores(q, keys, weight, bias, blocks, tiles, r, scale, sigmoid)


listed_scores_operator = torch.library.custom_op("gsa::listed_scores", _scores, mutates_args=())


@listed_scores_operator.register_fake
def _(q, keys, weight, bias, blocks, tiles, r, scale, sigmoid, start=-1):  # type: ignore[no-untyped-def]
    return q.new_empty(blocks.shape, dtype=torch.float32)


def _backward(
    dscore: Tensor,
    q: Tensor,
    keys: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    blocks: Tensor,
    tiles: Tensor | None,
    r: int,
    scale: float,
    sigmoid: bool,
    start: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dkeys, dweight, dbias); dbias is empty without a bias. Adds dkeys up atomically."""
    from . import at_launch

    dq, dk, dw, dbias = at_launch.gradients(
        dscore, q, keys, weight, bias, blocks, tiles, r, scale, sigmoid, start
    )
    # An output may not share its storage with another, nor be a part of a larger one.
    return dq, dk, dw, q.new_empty(0) if dbias is None else dbias


backward_operator = torch.library.custom_op(
    "gsa::listed_scores_backward", _backward, mutates_args=()
)


@backward_operator.register_fake
def _(dscore, q, keys, weight, bias, blocks, tiles, r, scale, sigmoid, start=-1):  # type: ignore[no-untyped-def]
    dbias = q.new_empty(0) if bias is None else torch.empty_like(bias)
    return torch.empty_like(q), torch.empty_like(keys), torch.empty_like(weight), dbias


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, keys, weight, bias, blocks, tiles, *ctx.settings = inputs
    ctx.save_for_backward(q, keys, weight, bias, blocks, tiles)


def _gradients(backward, ctx, dscore):  # type: ignore[no-untyped-def]
    q, keys, weight, bias, blocks, tiles = ctx.saved_tensors
    dq, dk, dw, dbias = backward(
        dscore.contiguous(), q, keys, weight, bias, blocks, tiles, *ctx.settings
    )
    return dq, dk, dw, None if bias is None else dbias, *(None,) * 6


listed_scores = differentiable(
    _scores,
    listed_scores_operator,
    _setup,
    partial(_gradients, _backward),
    partial(_gradients, backward_operator),
)
