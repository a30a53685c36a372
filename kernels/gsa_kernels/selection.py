"""Selection: which keys each query may attend, as compact lists of key blocks.

Legend: B batch, T queries, S keys, H selection heads (1 = shared by all heads, or the number of
key-value heads), Q query tiles, N selected slots, C keys per block, R queries per tile.

A tile of R neighbouring queries shares one choice, made at its anchor, the tile's first position,
so the choice never depends on a later token. A query t of a tile with anchor a attends

    the local window   keys floor_C(a - window + 1) .. t
    the sinks          the blocks that hold the first `sinks` positions of a's document
    the selected       N_t blocks of C keys, all of them before the local window

restricted to keys s <= t of t's own document. Blocks are aligned: block j is keys jC .. jC+C-1.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

LOWEST = {"key_block": 1, "query_tile": 1, "window": 1, "sinks": 0, "heads": 1}


@dataclass(frozen=True)
class SelectionSpec:
    """Granularity and forced keys of a selection. All counts are keys or queries."""

    key_block: int = 64  # C
    query_tile: int = 64  # R
    window: int = 128  # most recent keys of every query, itself included
    sinks: int = 0  # first keys of the document
    heads: int = 1  # choices per query: 1 for all heads together, or one per key-value head

    def __post_init__(self) -> None:
        for name, low in LOWEST.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")

    @property
    def sink_keys(self) -> int:
        """Keys the sinks take from a budget: `sinks` rounded up to whole blocks."""
        return -(-self.sinks // self.key_block) * self.key_block

    @cached_property
    def local_slots(self) -> int:
        """Most blocks that a tile's local window can touch, over every alignment."""
        c, r, w = self.key_block, self.query_tile, self.window
        longest = 1
        for anchor in range(c * r + r * (w // r + 1), 2 * c * r + r * (w // r + 1) + 1, r):
            first = (anchor - w + 1) // c
            longest = max(longest, (anchor + r - 1) // c - first + 1)
        return longest

    def blocks_for(self, keys: int) -> int:
        """Blocks left to choose when a query may attend `keys` keys in all."""
        return max(0, keys - self.window - self.sink_keys) // self.key_block

    def max_blocks(self, keys: int, n_keys: int) -> int:
        """Static width N of a selection list: the budget, or every block there is."""
        most = max(0, n_keys - self.window) // self.key_block
        return min(self.blocks_for(keys), most)


@dataclass(frozen=True)
class TileLayout:
    """Where the tiles of a run of queries lie, and what each is forced to attend.

    anchor_Q: first position of each tile. local_BQ: first key of the local window. sink_lo_BQ,
    sink_hi_BQ: the sink region [lo, hi). All are absolute positions, multiples of C but anchor_Q.
    The leading dimension is 1 when there are no documents.
    """

    spec: SelectionSpec
    q_start: int
    n_queries: int
    n_keys: int
    anchor_Q: Tensor
    local_BQ: Tensor
    sink_lo_BQ: Tensor
    sink_hi_BQ: Tensor

    @property
    def n_tiles(self) -> int:
        return self.anchor_Q.numel()

    def anchor(self, tile: int) -> int:
        """anchor_Q[tile], known without waiting for the device."""
        return (self.q_start // self.spec.query_tile + tile) * self.spec.query_tile

    @property
    def n_blocks(self) -> int:
        return -(-self.n_keys // self.spec.key_block)

    def candidates(self, tiles: slice, n_blocks: int) -> Tensor:
        """[B or 1, tiles, n_blocks] bool: blocks that may be chosen (neither sink nor local)."""
        c = self.spec.key_block
        block = torch.arange(n_blocks, device=self.anchor_Q.device) * c
        after_sinks = block >= self.sink_hi_BQ[:, tiles, None]
        return after_sinks & (block + c <= self.local_BQ[:, tiles, None])


def n_tiles(spec: SelectionSpec, n_queries: int, q_start: int = 0) -> int:
    """Query tiles that the queries q_start .. q_start + n_queries - 1 touch."""
    r = spec.query_tile
    return -(-(q_start + n_queries) // r) - q_start // r


def _check_range(q_start: int, n_queries: int, n_keys: int) -> None:
    if q_start < 0 or q_start + n_queries > n_keys:
        raise ValueError(f"queries {q_start}..{q_start + n_queries} do not lie in {n_keys} keys")


def tile_layout(
    spec: SelectionSpec,
    n_queries: int,
    n_keys: int,
    q_start: int = 0,
    doc_start_BS: Tensor | None = None,
    device: torch.device | str | None = None,
) -> TileLayout:
    """Lay tiles over the queries q_start .. q_start + n_queries - 1 of n_keys keys.

    doc_start_BS holds for each position the first position of its document.
    Raises ValueError unless the queries are the last of the keys or inside them.
    """
    _check_range(q_start, n_queries, n_keys)
    c, r = spec.key_block, spec.query_tile
    device = doc_start_BS.device if doc_start_BS is not None else device
    first = q_start // r
    anchor_Q = torch.arange(first, first + n_tiles(spec, n_queries, q_start), device=device) * r
    local_BQ = ((anchor_Q - spec.window + 1).clamp_min(0) // c * c)[None]
    if doc_start_BS is None:
        start_BQ = torch.zeros_like(local_BQ)
    else:
        start_BQ = doc_start_BS[:, anchor_Q]
    lo_BQ = start_BQ // c * c
    hi_BQ = (start_BQ + spec.sinks + c - 1) // c * c if spec.sinks else lo_BQ
    return TileLayout(spec, q_start, n_queries, n_keys, anchor_Q, local_BQ, lo_BQ, hi_BQ)


@dataclass(frozen=True)
class Selection:
    """The choice itself: blocks_BHQN holds block numbers, ascending, padded with -1 at the end."""

    spec: SelectionSpec
    blocks_BHQN: Tensor
    n_queries: int
    n_keys: int
    q_start: int = 0
    doc_start_BS: Tensor | None = None

    def __post_init__(self) -> None:
        _check_range(self.q_start, self.n_queries, self.n_keys)
        tiles = n_tiles(self.spec, self.n_queries, self.q_start)
        if self.blocks_BHQN.ndim != 4 or self.blocks_BHQN.shape[2] != tiles:
            raise ValueError(
                f"blocks must be [batch, heads, {tiles} tiles, slots], "
                f"got {tuple(self.blocks_BHQN.shape)}"
            )

    @cached_property
    def layout(self) -> TileLayout:
        return tile_layout(
            self.spec,
            self.n_queries,
            self.n_keys,
            self.q_start,
            self.doc_start_BS,
            self.blocks_BHQN.device,
        )

    @property
    def counts_BHQ(self) -> Tensor:
        """Selected blocks per tile."""
        return (self.blocks_BHQN >= 0).sum(-1)

    @property
    def sink_slots(self) -> int:
        """Blocks that may hold sinks; one more with documents, which start anywhere."""
        spec = self.spec
        if not spec.sinks:
            return 0
        return spec.sink_keys // spec.key_block + (self.doc_start_BS is not None)

    def slots(self, tiles: slice) -> tuple[Tensor, Tensor]:
        """Every block a tile attends: (blocks, valid), both [B, H, tiles, M].

        Slots are ordered [sinks | selected | local window]; M is static. An invalid slot holds
        block 0. The last `spec.local_slots` slots need the causal mask; no other slot does.
        """
        spec, lay = self.spec, self.layout
        c = spec.key_block
        chosen = self.blocks_BHQN[:, :, tiles].long()
        batch, heads = chosen.shape[:2]
        local = lay.local_BQ[:, tiles, None]
        near = local // c + torch.arange(spec.local_slots, device=chosen.device)
        last = lay.anchor_Q[tiles, None] + spec.query_tile - 1
        near_ok = (near * c <= last) & (near < lay.n_blocks)
        sink = lay.sink_lo_BQ[:, tiles, None] // c
        sink = sink + torch.arange(self.sink_slots, device=chosen.device)
        sink_ok = (sink * c < lay.sink_hi_BQ[:, tiles, None]) & (sink * c + c <= local)

        def spread(x: Tensor) -> Tensor:
            return x[:, None].expand(batch, heads, -1, -1)

        blocks = torch.cat([spread(sink), chosen, spread(near)], -1)
        valid = torch.cat([spread(sink_ok), chosen >= 0, spread(near_ok)], -1)
        return blocks.masked_fill(~valid, 0), valid

    def attended_BHT(self) -> Tensor:
        """Keys each query attends, counted (no T x S tensor)."""
        spec = self.spec
        c, r = spec.key_block, spec.query_tile
        position = torch.arange(self.q_start, self.q_start + self.n_queries)
        position = position.to(self.blocks_BHQN.device)
        tile = position // r - self.q_start // r
        start = torch.zeros_like(position)[None]
        if self.doc_start_BS is not None:
            start = self.doc_start_BS[:, self.q_start : self.q_start + self.n_queries]
        lay = self.layout
        local = torch.maximum(lay.local_BQ[:, tile], start)
        near = (position - local + 1)[:, None]
        blocks, valid = self.slots(slice(None))
        outer = blocks[..., : -spec.local_slots]  # sinks and selected lie wholly before the window
        total = torch.zeros((), dtype=torch.long, device=position.device)
        if self.doc_start_BS is None:
            return valid[..., : -spec.local_slots].sum(-1)[:, :, tile] * c + near
        # Whole blocks minus their part before the query's document, slot by slot.
        for slot in range(outer.shape[-1]):
            low = outer[..., slot][:, :, tile] * c
            inside = (low + c - torch.maximum(low, start[:, None])).clamp_min(0)
            total = total + inside * valid[..., slot][:, :, tile]
        return total + near

    def to_dense_mask(self) -> Tensor:
        """[B, H, T, S] bool, True where a query attends a key. For tests and small T only."""
        spec = self.spec
        c, r = spec.key_block, spec.query_tile
        device = self.blocks_BHQN.device
        blocks, valid = self.slots(slice(None))
        batch, heads, tiles, _ = blocks.shape
        hit = torch.zeros(batch, heads, tiles, self.layout.n_blocks + 1, device=device)
        hit.scatter_(-1, blocks.masked_fill(~valid, self.layout.n_blocks), 1.0)
        hit = hit[..., :-1].bool().repeat_interleave(c, -1)[..., : self.n_keys]
        query = torch.arange(self.q_start, self.q_start + self.n_queries, device=device)
        mask = hit[:, :, query // r - self.q_start // r]
        key = torch.arange(self.n_keys, device=device)
        mask = mask & (key <= query[:, None])
        if self.doc_start_BS is not None:
            start = self.doc_start_BS[:, query]
            mask = mask & (key >= start[..., None])[:, None]
        return mask

    def to_layout(self, block: int) -> Tensor:
        """[B, H, rows, columns] bool: cells of `block` x `block` with at least one attended pair.

        What block-sparse backends take (xformers). Row 0 begins at the multiple of `block` at or
        before the first query. Costs (T / block)(S / block). Raises ValueError where key blocks or
        query tiles straddle the cells.
        """
        from .selection_views import layout

        return layout(self, block)

    def to_block_mask(self, block: int = 128, heads: int | None = None) -> Any:
        """A FlexAttention BlockMask with cells of `block` x `block`, exact pair by pair.

        heads: query heads, needed where there is one choice per key-value head. The rule inside
        the cells reads (T / R)(S / C) bits: ValueError for C = R = 1, where those are T x S.
        """
        from .selection_views import block_mask

        return block_mask(self, block, heads)

    def rows(self, low: int, high: int) -> "Selection":
        """The same choice for queries low .. high-1 of this call alone, keys up to the last."""
        r, start, end = self.spec.query_tile, self.q_start + low, self.q_start + high
        first = self.q_start // r
        tiles = slice(start // r - first, (end - 1) // r + 1 - first)
        blocks = self.blocks_BHQN[:, :, tiles]
        return Selection(self.spec, blocks, high - low, end, start, self.doc_start_BS)

    def tail(self) -> "Selection | None":
        """The unfinished last tile, which decoding must go on with; None if it is complete."""
        end = self.q_start + self.n_queries
        if end % self.spec.query_tile == 0:
            return None
        start = end // self.spec.query_tile * self.spec.query_tile
        start = max(start, self.q_start)
        return Selection(
            self.spec, self.blocks_BHQN[:, :, -1:], end - start, end, start, self.doc_start_BS
        )
