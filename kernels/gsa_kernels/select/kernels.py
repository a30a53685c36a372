"""Selection by the Triton kernels: pooled keys, scores of some tiles, their best blocks."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gsa_kernels.index_score import ops as score_ops
from gsa_kernels.index_score import survivor_ops
from gsa_kernels.index_score.api import BlockScores, HierarchicalFactors, IndexFactors, Scored
from gsa_kernels.index_score.fp8 import product_dtype
from gsa_kernels.index_score.pooled import Pooled, both_signs, pooled_keys
from gsa_kernels.selection import SelectionSpec, TileLayout, n_tiles

from . import filtering, ops
from .chunked import Rows
from .eager import EagerRows, named
from .statistics import STATISTICS

SCORES_HELD = 1 << 25  # float32 numbers: 128 MiB
LONGEST = 4096  # columns of a row that a program holds in registers
LONG_ROWS = 1024  # longer rows at a time: each has a list of 4096 candidates or more
MOST_BLOCKS = 16384  # choices per row that the kernels take
WIDEST = 128  # index channels
MOST_HEADS = 64  # index heads of one selection, coarse to fine


def no_kernel(factors: BlockScores, spec: SelectionSpec, width: int) -> str:
    """Why the kernels cannot select for these factors; empty when they can. width: slots."""
    if width > MOST_BLOCKS:
        return f"the kernels choose at most {MOST_BLOCKS} blocks per row, not {width}"
    if not scores_in_kernel(factors):
        return ""
    assert isinstance(factors, IndexFactors)
    if torch.float64 in (factors.q_BTJI.dtype, factors.k_BSI.dtype):
        return "the kernels compute in float32 at most: float64 needs eager"
    if factors.q_BTJI.shape[3] > WIDEST:
        return f"the kernels take up to {WIDEST} index channels, not {factors.q_BTJI.shape[3]}"
    if factors.block_score == "max" and spec.key_block > 128:
        return f"the kernels take the maximum of up to 128 keys, not {spec.key_block}"
    if isinstance(factors, HierarchicalFactors):
        return _not_coarse(factors)
    return ""


def _not_coarse(factors: HierarchicalFactors) -> str:
    if factors.bounded and 2 * factors.q_BTJI.shape[3] > WIDEST:
        return f"the kernels take bounds of up to {WIDEST // 2} index channels"
    if factors.q_BTJI.shape[2] > MOST_HEADS * factors.heads:
        return f"the kernels take up to {MOST_HEADS} index heads per selection, coarse to fine"
    return ""


def rows_together(k_BSI: Tensor) -> Tensor:
    """k, whose keys lie one behind the other: a view of a longer cache is not copied."""
    together = k_BSI.stride()[1:] == (k_BSI.shape[2], 1)
    return k_BSI if together else k_BSI.contiguous()


def scores_in_kernel(factors: BlockScores) -> bool:
    """Whether the kernels know this score; other classes compute their own."""
    return type(factors) in (IndexFactors, HierarchicalFactors)


@dataclass(frozen=True)
class _Held(Scored):
    """buffer: the kernel's rows, padded, of which `scores` is a view. survivors [B, H, tiles, P]:
    the pooling blocks whose blocks these are the scores of."""

    buffer: Tensor | None = None
    survivors: Tensor | None = None


class KernelRows(EagerRows):
    """Scores of another class come from the class, as eagerly; the choice is the kernel's."""

    def choose(
        self, scored: Scored, tiles: slice, wanted: int | Tensor, most: int, n_blocks: int
    ) -> Tensor:
        scores = scored.scores.float().masked_fill(~scored.allowed, -torch.inf).contiguous()
        width = min(most, scores.shape[-1])
        return named(_top(scores, scores.shape[-1], wanted, width, None, [], 0), scored)


class FactorRows(Rows):
    """IndexFactors, whose scores have a kernel. The layout is only for statistics. width: the most
    blocks chosen per tile; with 0 all scores are written, however long the rows. names: the
    statistics that will be asked for; of long rows of single keys all but a histogram are taken
    without writing scores."""

    def __init__(
        self,
        factors: IndexFactors,
        spec: SelectionSpec,
        layout: TileLayout | None,
        doc_start_BS: Tensor | None,
        width: int = 0,
        names: tuple[str, ...] = (),
    ) -> None:
        self.factors = factors
        self.spec, self.tile_layout = spec, layout
        self.tiles = n_tiles(spec, factors.n_queries, factors.q_start)
        self.first_tile = factors.q_start // spec.query_tile
        self.sizes = [spec.key_block, spec.query_tile, spec.window, spec.sinks]
        batch, n_keys = factors.k_BSI.shape[:2]
        self.docs = doc_start_BS
        if doc_start_BS is not None:
            self.docs = doc_start_BS[:, :n_keys].expand(batch, -1).contiguous()
        self.q, self.weight = factors.q_BTJI.contiguous(), factors.weight_BTJ.contiguous()
        self.bias = None if factors.bias_J is None else factors.bias_J.contiguous()
        self.keys: Tensor | None = None
        self.sample: Tensor | None = None
        self.plan: filtering.Plan | None = None
        self.streams = False
        if type(factors) is IndexFactors and "histogram" not in names:  # it reads all scores
            self.plan = filtering.plan(factors, spec, width, self.tiles, LONGEST)
            self.streams = bool(names) and filtering.streams(factors, spec)

    def filtered(self, tile: int) -> bool:
        """Whether the tile's chunk is chosen from lists: its rows are long."""
        return self.plan is not None and self._long(tile)

    def _long(self, tile: int) -> bool:
        return self._reach(tile) > LONGEST

    def _reach(self, tile: int) -> int:
        return (self.first_tile + tile) * self.spec.query_tile + 1

    def stop(self, tile: int) -> int:
        c, r = self.spec.key_block, self.spec.query_tile
        # Most tiles n whose n rows of blocks up to the last one's reach, n (reach + n R) / C, fit.
        reach = self._reach(tile)
        lists = self.q.shape[0] * self.factors.heads
        room = SCORES_HELD * c // lists
        rows = (math.isqrt(reach * reach + 4 * r * room) - reach) // (2 * r)
        rows = min(rows, self.tiles - tile)
        if self.plan is not None and self.filtered(tile):
            rows = min(self.plan.rows, self.tiles - tile)
        elif (self.plan is not None or self.streams) and not self._long(tile):
            rows = min(rows, (LONGEST - reach) // r + 1)
        elif reach + rows * r > LONGEST * c:
            rows = min(rows, max(LONG_ROWS // lists, (LONGEST * c - reach) // r))
        return tile + max(1, rows)

    def score(self, tiles: slice, n_blocks: int) -> Scored:
        factors, spec = self.factors, self.spec
        if self.filtered(tiles.start):
            none = self.q[:0]
            return Scored(none, none)
        single = factors.block_score == "max" and spec.key_block > 1
        if self.keys is None:
            self.keys = self._scored_keys(single)
        scores = score_ops.block_scores(
            self.q,
            self.keys,
            self.weight,
            self.bias,
            self.docs,
            [*self.sizes, factors.q_start],
            [self.first_tile + tiles.start, self.first_tile + tiles.stop, n_blocks],
            float(factors.scale),
            factors.activation == "sigmoid",
            factors.heads,
            single,
        )
        layout, view = self.tile_layout, scores[..., :n_blocks]
        if layout is None or self._streamed(tiles):  # nobody asks who is allowed
            return _Held(view, view, buffer=scores)
        return _Held(view, layout.candidates(tiles, n_blocks)[:, None], buffer=scores)

    def _streamed(self, tiles: slice) -> bool:
        return self.streams and self._long(tiles.start)

    def statistics(
        self, scored: Scored, tiles: slice, names: tuple[str, ...], n_blocks: int
    ) -> dict[str, Tensor]:
        if not self._streamed(tiles):
            return super().statistics(scored, tiles, names, n_blocks)
        factors = self.factors
        found = ops.key_statistics(
            self.q,
            rows_together(factors.k_BSI),
            self.weight,
            self.bias,
            self.docs,
            [*self.sizes[1:], factors.q_start],
            [self.first_tile + tiles.start, self.first_tile + tiles.stop, n_blocks],
            float(factors.scale),
            factors.activation == "sigmoid",
            factors.heads,
            "entropy" in names,
        )
        return {name: x for name, x in zip(STATISTICS, found) if name in names}

    def _scored_keys(self, single: bool) -> Tensor:
        k, block = rows_together(self.factors.k_BSI), self.spec.key_block
        if single or block == 1:
            return k[:, :, None]
        dtype = product_dtype(self.q, k)
        parts = 1 if dtype == torch.float32 or dtype != self.q.dtype else 3
        return score_ops.pool_keys(k, self.docs, block, parts, dtype)

    def choose(
        self, scored: Scored, tiles: slice, wanted: int | Tensor, most: int, n_blocks: int
    ) -> Tensor:
        first = self.first_tile + tiles.start
        if self.plan is not None and self.filtered(tiles.start):
            return self._from_lists(self.plan, tiles, wanted, most, n_blocks)
        assert isinstance(scored, _Held) and scored.buffer is not None
        return _top(scored.buffer, n_blocks, wanted, most, self.docs, self.sizes, first)

    def _from_lists(
        self, plan: filtering.Plan, tiles: slice, wanted: int | Tensor, width: int, n_blocks: int
    ) -> Tensor:
        factors = self.factors
        each, most = _each_and_most(wanted, width)
        if self.sample is None:
            self.sample = filtering.sample_of(factors.k_BSI, plan.stride)
        return ops.filtered_keys(
            self.q,
            factors.k_BSI.contiguous(),
            self.sample,
            self.weight,
            self.bias,
            self.docs,
            each,
            most,
            width,
            [*self.sizes[1:], factors.q_start],
            [self.first_tile + tiles.start, self.first_tile + tiles.stop, n_blocks],
            plan.places,
            plan.stride,
            float(factors.scale),
            factors.activation == "sigmoid",
            factors.heads,
        )


class CoarseRows(FactorRows):
    """HierarchicalFactors: scores of pooling blocks, a choice among those, scores inside them."""

    factors: HierarchicalFactors

    def __init__(
        self,
        factors: HierarchicalFactors,
        spec: SelectionSpec,
        layout: TileLayout | None,
        doc_start_BS: Tensor | None,
    ) -> None:
        super().__init__(factors, spec, layout, doc_start_BS)
        factors.check(spec.key_block)
        self.ratio = factors.pool // spec.key_block
        self.pooled: Pooled | None = None

    def stop(self, tile: int) -> int:
        coarse = self.factors.k_BSI.shape[1] // self.factors.pool + 1
        fine = min(self.factors.survivors, coarse) * self.ratio
        lists = self.q.shape[0] * self.factors.heads
        rows = SCORES_HELD // (lists * (coarse + fine))
        if max(coarse, fine) > LONGEST:
            rows = min(rows, LONG_ROWS // lists)
        return tile + max(1, min(rows, self.tiles - tile))

    def score(self, tiles: slice, n_blocks: int) -> Scored:
        factors = self.factors
        single = factors.block_score == "max" and self.spec.key_block > 1
        if self.keys is None or self.pooled is None:
            self.keys = self._scored_keys(single)
            factors.check_weights()
            self.q_coarse = both_signs(self.q) if factors.bounded else self.q
            self.pooled = pooled_keys(factors, self.docs, self._running)
            self.whole = rows_together(self.pooled.whole_BMI)[:, :, None]
        first = self.first_tile + tiles.start
        running, edge_start = self._edges(self.pooled, first, self.first_tile + tiles.stop)
        columns = -(-n_blocks // self.ratio)
        shared = (float(factors.scale), factors.activation == "sigmoid")
        coarse = score_ops.block_scores(
            self.q_coarse,
            self.whole,
            self.weight,
            self.bias,
            self.docs,
            [*self.sizes, factors.q_start],
            [first, self.first_tile + tiles.stop, columns],
            *shared,
            factors.heads,
            False,
            running,
            self.ratio,
            edge_start,
        )
        most = min(factors.survivors, columns)
        best = ops.top_blocks(
            coarse, columns, None, most, most, self.docs, self.sizes, first, None, self.ratio
        )
        scores = survivor_ops.survivor_scores(
            self.q,
            self.keys,
            self.weight,
            self.bias,
            self.docs,
            best,
            [*self.sizes, factors.q_start, self.ratio],
            first,
            *shared,
            single,
        )
        held = _Held(scores, scores, buffer=scores, survivors=best)
        if self.tile_layout is None:  # no statistics: nobody asks who is allowed
            return held
        unseen = factors.unseen(coarse[..., :columns], self.tile_layout, tiles)
        return replace(held, allowed=scores != -torch.inf, unseen=unseen)

    def _running(self, k: Tensor, docs: Tensor | None) -> Tensor:
        """Keys pooled up to each position."""
        dtype, k = product_dtype(self.q, k), rows_together(k)
        factors = self.factors
        return survivor_ops.running_pool(k, docs, factors.pool, factors.pooling, dtype)

    def _edges(self, pooled: Pooled, first: int, stop: int) -> tuple[Tensor, int]:
        """(keys pooled up to the positions from n on, n), with all that some tiles need."""
        if pooled.running_BSI is not None:
            return pooled.running_BSI, 0
        c, r = self.spec.key_block, self.spec.query_tile
        last = [max(0, tile * r - self.spec.window + 1) // c * c for tile in (first, stop - 1)]
        low = max(0, last[0] - 1) // self.factors.pool * self.factors.pool
        at = slice(low, max(last[1], low + 1))
        docs = None if self.docs is None else self.docs[:, at] - low
        return self._running(self.factors.k_BSI[:, at], docs), low

    def choose(
        self, scored: Scored, tiles: slice, wanted: int | Tensor, most: int, n_blocks: int
    ) -> Tensor:
        assert isinstance(scored, _Held)
        scores = scored.scores
        width = min(most, scores.shape[-1])
        parents = (scored.survivors, self.ratio)
        return _top(scores, scores.shape[-1], wanted, width, None, [], 0, *parents)


def _top(
    scores: Tensor,
    columns: int,
    wanted: int | Tensor,
    width: int,
    docs: Tensor | None,
    sizes: list[int],
    first_tile: int,
    parents: Tensor | None = None,
    ratio: int = 1,
) -> Tensor:
    each, most = _each_and_most(wanted, width)
    return ops.top_blocks(
        scores, columns, each, most, width, docs, sizes, first_tile, parents, ratio
    )


def _each_and_most(wanted: int | Tensor, width: int) -> tuple[Tensor | None, int]:
    if isinstance(wanted, int):
        return None, wanted
    return wanted.to(torch.int32).contiguous(), width
