"""Launch of the gradient of listed scores by unions of lists. Called by at_launch.py only."""

import torch
from torch import Tensor

from gsa_kernels.launch import run
from gsa_kernels.selection import Selection, SelectionSpec
from gsa_kernels.sizes import padded
from gsa_kernels.sparse_attention.triton_union import UNITED, parts, unite

from .triton_at_union import union_gradient_kernel

FEWEST = 4096  # queries of all sequences and selection heads, 16 a program
STAGES = 3
SCRATCH = 200_000_000  # bytes of unions at a time


def united(
    q: Tensor, keys: Tensor, blocks: Tensor, tiles: Tensor | None, r: int, start: int
) -> bool:
    """Whether `union_gradients` takes these arguments of `at_launch.gradients`."""
    heads = q.shape[2] // blocks.shape[1]
    widest = 128 if q.dtype == torch.bfloat16 else 64  # wider ones spill
    return (
        start >= 0
        and tiles is None
        and r == 1
        and q.dtype == keys.dtype
        and q.element_size() == 2
        and heads in (1, 2, 4)
        and q.shape[3] <= widest
        and blocks[..., 0].numel() >= FEWEST
    )


def _registers(q: Tensor) -> int | None:
    """Most per thread: of small products three programs fit onto a multiprocessor."""
    return 168 if q.dtype == torch.bfloat16 and q.shape[3] <= 64 else None


def union_gradients(
    dscore: Tensor,
    q: Tensor,
    keys: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    blocks: Tensor,
    start: int,
    scale: float,
    sigmoid: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As `at_launch.gradients`; blocks: of single keys, start: see `at_ops`."""
    batch, queries, heads, width = q.shape
    groups, slots = blocks.shape[1], blocks.shape[3]
    # Of this spec only C, R and the absence of sinks matter: lists are given.
    spec = SelectionSpec(1, 1, window=1, heads=groups)
    selection = Selection(spec, blocks, queries, keys.shape[1], start)
    dq, dw = torch.empty_like(q), torch.empty_like(weight)
    dk = torch.zeros(keys.shape, device=q.device, dtype=torch.float32)
    dbias = torch.empty(
        (0,) if bias is None else (batch * queries, heads), device=q.device, dtype=torch.float32
    )
    for part in parts(selection, 0, scratch=SCRATCH):
        unions = unite(selection, None, False, part)
        run(
            union_gradient_kernel, (part[1], batch * groups),
            q, keys, weight, weight if bias is None else bias, dscore, dq, dk, dw, dbias,
            unions.lists_BHUN, unions.bits_BHUN, unions.counts_BHU,
            queries, keys.shape[1], slots, unions.lists_BHUN.shape[3],
            part[0] * UNITED - start % UNITED, scale,
            J=heads, D=width, HS=groups, BI=padded(width),
            HAS_BIAS=bias is not None, SIGMOID=sigmoid,
            STAGES=STAGES, num_warps=4, maxnreg=_registers(q),
        )  # fmt: skip
    return dq, dk.to(keys.dtype), dw, None if bias is None else dbias.sum(0).to(bias.dtype)
