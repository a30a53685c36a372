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


def _filtered_keys(
    q: Tensor,
    k: Tensor,
    sample: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    docs: Tensor | None,
    wanted: Tensor | None,
    most: int,
    width: int,
    sizes: list[int],
    tiles: list[int],
    places: int,
    stride: int,
    scale: float,
    sigmoid: bool,
    heads: int,
) -> Tensor:
    """[B, H, rows, width] int32: the best single keys at the anchors of tiles, as top_blocks of
    their block_scores; of these only some are held. No gradient.

    q [B, T, J, I], k [B, S, I], weight [B, T, J], bias [J], docs [B, S]. wanted [B, H, rows]
    int32 or None; never more than `most`, nor width. sample [B, S // stride, 1, I]: of every
    `stride` keys one, by whose scores the choice is short; it is the same for any sample.
    sizes: R, window, sinks, q_start. tiles: the first one, the one after the last, and the
    columns that the last can reach. places: scores held per row, more than are wanted (see
    filtering.Plan). Raises ValueError on NaN (a CUDA device asserts instead).
    """
    from . import filter_launch

    fine = torch.ones(1, dtype=torch.int32, device=q.device)
    out = filter_launch.filtered_keys(
        q,
        k,
        sample,
        weight,
        bias,
        docs,
        wanted,
        min(most, width),
        width,
        sizes,
        tiles,
        places,
        stride,
        scale,
        sigmoid,
        heads,
        fine,
    )
    refuse_nan(fine)
    return out


filtered_keys_operator = torch.library.custom_op(
    "gsa::filtered_keys", _filtered_keys, mutates_args=()
)
filtered_keys = undispatched(_filtered_keys, filtered_keys_operator)


@filtered_keys_operator.register_fake
def _(q, k, sample, weight, bias, docs, wanted, most, width, sizes, tiles, *rest):  # type: ignore[no-untyped-def]
    shape = (q.shape[0], rest[-1], tiles[1] - tiles[0], width)
    return q.new_empty(shape, dtype=torch.int32)


def _key_statistics(
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
    entropy: bool,
) -> Tensor:
    """[4 or 5, B, H, rows] float32: count, mean, variance, max and, if asked for, entropy of the
    scores of single keys at the anchors of tiles (statistics.py); no score is held. No gradient.

    q [B, T, J, I], k [B, S, I] with keys one behind the other, weight [B, T, J], bias [J], docs
    [B, S]. sizes, tiles: as filtered_keys'. A row's statistics do not depend, in any bit, on the
    other rows or on S. NaN where a candidate is NaN, but for count and max.
    """
    from . import statistics_launch

    return statistics_launch.key_statistics(
        q, k, weight, bias, docs, sizes, tiles, scale, sigmoid, heads, entropy
    )


key_statistics_operator = torch.library.custom_op(
    "gsa::key_statistics", _key_statistics, mutates_args=()
)
key_statistics = undispatched(_key_statistics, key_statistics_operator)


@key_statistics_operator.register_fake
def _(q, k, weight, bias, docs, sizes, tiles, scale, sigmoid, heads, entropy):  # type: ignore[no-untyped-def]
    shape = (4 + entropy, q.shape[0], heads, tiles[1] - tiles[0])
    return q.new_empty(shape, dtype=torch.float32)
