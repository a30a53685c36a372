"""torch.library operators over the selection kernels. Imports no triton until an operator runs."""

import torch
from torch import Tensor

from gsa_kernels.dispatch import undispatched
from gsa_kernels.topk import refuse_nan


def _top_blocks(
    scores: Tensor,
    columns: int,
    wanted: Tensor | None,
    most: int,
    width: int,
    docs: Tensor | None,
    sizes: list[int],
    first_tile: int,
    parents: Tensor | None = None,
    ratio: int = 1,
) -> Tensor:
    """[B, H, rows, width] int32: the best columns of each row, as topk.top_blocks.

    scores [B, H, rows, stride] float32, contiguous; the first `columns` of a row count. sizes:
    C, R, window, sinks: candidates are those of tiles first_tile .. (docs: [B, S]), and no other
    column has an effect; with ratio, columns are pooling blocks of so many blocks, and candidates
    those that hold one. Empty sizes: every column is a candidate. parents [B, H, rows, P] int32:
    column n is the block n % ratio of pooling block parents[n // ratio], and is called so. wanted
    [B, H, rows] int32 or None; never more than `most`, nor width. Raises ValueError on NaN (a CUDA
    device asserts instead).
    """
    from . import triton_launch

    fine = torch.ones(1, dtype=torch.int32, device=scores.device)
    out = triton_launch.top_blocks(
        scores,
        columns,
        wanted,
        min(most, width),
        width,
        docs,
        sizes,
        first_tile,
        parents,
        ratio,
        fine,
    )
    refuse_nan(fine)
    return out


top_blocks_operator = torch.library.custom_op("gsa::top_blocks", _top_blocks, mutates_args=())
top_blocks = undispatched(_top_blocks, top_blocks_operator)


@top_blocks_operator.register_fake
def _(scores, columns, wanted, most, width, docs, sizes, first_tile, parents=None, ratio=1):  # type: ignore[no-untyped-def]
    return scores.new_empty((*scores.shape[:3], width), dtype=torch.int32)
