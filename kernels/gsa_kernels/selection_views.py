"""A Selection as the block layouts and masks that other backends take.

Legend: B batch, H selection heads, Q query tiles, M slots of a tile, C keys per block, R queries
per tile. A cell is a square of `block` queries by `block` keys. Only the table of cells grows with
T x S, at one entry for block^2 pairs.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .selection import Selection

_CHUNK = 1 << 22  # slots handled at once
_BITS = 32  # key blocks per word of the membership table


def layout(selection: "Selection", block: int) -> Tensor:
    """[B, H, rows, columns] bool: cells with an attended pair, from a multiple of block on.

    Raises ValueError where key blocks or query tiles straddle the cells.
    """
    c, r = selection.spec.key_block, selection.spec.query_tile
    if not _multiple(block, c) or not _multiple(block, r):
        raise ValueError(
            f"a layout of {block} x {block} blocks does not line up with key blocks of "
            f"{c} and query tiles of {r}"
        )
    origin = selection.q_start // block * block
    return (_pairs(selection, block, origin) > 0) & _causal(selection, block, origin)


def block_mask(selection: "Selection", block: int, heads: int | None) -> Any:
    """A FlexAttention BlockMask whose first query is the selection's, exact pair by pair.

    Cells in which every pair is attended are marked full: FlexAttention skips the rule there.
    heads: query heads, where the selection has one choice per key-value head.
    Raises ValueError for single keys chosen by single queries (the membership table would be
    T x S bits) and for key blocks that straddle the cells.
    """
    from torch.nn.attention.flex_attention import BlockMask

    spec, docs = selection.spec, selection.doc_start_BS
    c, r = spec.key_block, spec.query_tile
    if c * r == 1:
        raise ValueError(
            "a FlexAttention mask of single keys chosen by single queries is T x S: "
            "choose blocks of keys (C > 1) or tiles of queries (R > 1)"
        )
    if not _multiple(block, c):
        raise ValueError(f"key blocks of {c} do not line up with cells of {block} keys")
    origin = selection.q_start
    pairs = _pairs(selection, block, origin)
    some = (pairs > 0) & _causal(selection, block, origin)
    full = some & (pairs == _most(selection, block, origin))
    if docs is not None:  # a full cell's keys belong to the document of its last query
        full &= _in_document(selection, block, origin)
    group = 1 if heads is None else heads // pairs.shape[1]
    shared = pairs.shape[1] == 1
    if group > 1 and not shared:
        some, full = (x.repeat_interleave(group, 1) for x in (some, full))
    words = _words(selection)
    start = torch.tensor(origin, device=words.device)
    first = origin // r

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        position, key_block = q + start, k // c
        head = h * 0 if shared else h // group
        word = words[b, head, position // r - first, key_block // _BITS]
        ok = ((word >> (key_block % _BITS)) & 1 == 1) & (k <= position)
        return ok if docs is None else ok & (k >= docs[b, position])

    return BlockMask.from_kv_blocks(
        *_ordered(some & ~full),
        *_ordered(full),
        BLOCK_SIZE=block,
        mask_mod=allowed,
        seq_lengths=(selection.n_queries, selection.n_keys),
    )


def _multiple(a: int, b: int) -> bool:
    return a % b == 0 or b % a == 0


def _ordered(cells: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of cells: how many there are, and their columns first."""
    order = cells.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return cells.sum(-1).to(torch.int32), order.to(torch.int32)


def _tiles(selection: "Selection") -> Iterator[slice]:
    slots = selection.sink_slots + selection.blocks_BHQN.shape[-1] + selection.spec.local_slots
    step = max(1, _CHUNK // slots)
    for low in range(0, selection.layout.n_tiles, step):
        yield slice(low, min(selection.layout.n_tiles, low + step))


def _size(selection: "Selection", block: int, origin: int) -> tuple[int, int]:
    rows = -(-(selection.q_start + selection.n_queries - origin) // block)
    return rows, -(-selection.n_keys // block)


def _pairs(selection: "Selection", block: int, origin: int) -> Tensor:
    """[B, H, rows, columns] int32: how many (tile, key block) pairs of the selection each cell
    holds, a key block counted once in every cell it reaches; row 0 begins at query `origin`."""
    spec = selection.spec
    rows, columns = _size(selection, block, origin)
    batch, heads = selection.blocks_BHQN.shape[:2]
    end = selection.q_start + selection.n_queries
    device = selection.blocks_BHQN.device
    table = torch.zeros(batch, heads, rows * columns + 1, dtype=torch.int32, device=device)
    wide = max(1, spec.key_block // block)  # cells along a key block
    for tiles in _tiles(selection):
        anchor = selection.layout.anchor_Q[tiles]
        top = (anchor.clamp_min(selection.q_start) - origin) // block
        bottom = ((anchor + spec.query_tile).clamp_max(end) - 1 - origin) // block
        blocks, valid = selection.slots(tiles)
        column = blocks * spec.key_block // block
        if wide > 1:
            column = (column[..., None] + torch.arange(wide, device=device)).flatten(-2)
            valid = valid.repeat_interleave(wide, -1) & (column < columns)
        for down in range(-(-spec.query_tile // block) + 1):
            row = (top + down)[:, None]
            inside = valid & (row <= bottom[:, None])
            index = (row * columns + column).masked_fill(~inside, rows * columns).flatten(2)
            table.scatter_add_(-1, index, torch.ones_like(index, dtype=torch.int32))
    return table[..., :-1].unflatten(-1, (rows, columns))


def _rows(selection: "Selection", block: int, origin: int) -> tuple[Tensor, Tensor]:
    """First and last query of each row of cells."""
    rows, _ = _size(selection, block, origin)
    end = selection.q_start + selection.n_queries
    first = origin + torch.arange(rows, device=selection.blocks_BHQN.device) * block
    return first.clamp_min(selection.q_start), (first + block).clamp_max(end) - 1


def _causal(selection: "Selection", block: int, origin: int) -> Tensor:
    """[rows, columns] bool: cells with a key at or before one of their queries."""
    _, last = _rows(selection, block, origin)
    column = torch.arange(_size(selection, block, origin)[1], device=last.device)
    return column * block <= last[:, None]


def _most(selection: "Selection", block: int, origin: int) -> Tensor:
    """[rows, columns] pairs of a cell that is selected throughout; -1 where the mask cuts it."""
    c, r = selection.spec.key_block, selection.spec.query_tile
    first, last = (x[:, None] for x in _rows(selection, block, origin))
    column = torch.arange(_size(selection, block, origin)[1], device=first.device)
    most = (last // r - first // r + 1) * max(1, block // c)
    return most.masked_fill((column + 1) * block - 1 > first, -1)


def _in_document(selection: "Selection", block: int, origin: int) -> Tensor:
    """[B, 1, rows, columns] bool: cells whose keys belong to the document of every query."""
    assert selection.doc_start_BS is not None
    _, last = _rows(selection, block, origin)
    column = torch.arange(_size(selection, block, origin)[1], device=last.device)
    return column * block >= selection.doc_start_BS[:, None, last, None]


def _words(selection: "Selection") -> Tensor:
    """[B, H, Q, words] int32: bit j % 32 of word j // 32 is set where a tile attends key block j.

    (T / R)(S / C) bits.
    """
    batch, heads, tiles, _ = selection.blocks_BHQN.shape
    device = selection.blocks_BHQN.device
    n = -(-selection.layout.n_blocks // _BITS)
    words = torch.zeros(batch, heads, tiles, n + 1, dtype=torch.int32, device=device)
    for part in _tiles(selection):
        blocks, valid = selection.slots(part)
        bits = torch.ones_like(blocks, dtype=torch.int32) << (blocks % _BITS).to(torch.int32)
        # Every block has one slot, so adding bits sets them.
        words[:, :, part].scatter_add_(-1, (blocks // _BITS).masked_fill(~valid, n), bits)
    return words[..., :-1].contiguous()
