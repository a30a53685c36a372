"""Which keys a selection attends: layout, masks, counts and the views for other backends."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    GRANULARITIES,
    LENGTHS,
    causal,
    granularity_id,
    make_documents,
    make_selection,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gsa_kernels import selection_views
from gsa_kernels.selection import Selection, SelectionSpec, tile_layout

granularities = pytest.mark.parametrize("granularity", GRANULARITIES, ids=granularity_id)
lengths = pytest.mark.parametrize("length", LENGTHS)
documents = pytest.mark.parametrize("documents", [False, True], ids=["one_doc", "docs"])


def brute_force(selection: Selection) -> torch.Tensor:
    """The definition at the head of selection.py, one query at a time."""
    spec, docs = selection.spec, selection.doc_start_BS
    c, r = spec.key_block, spec.query_tile
    batch, heads = selection.blocks_BHQN.shape[:2]
    mask = torch.zeros(batch, heads, selection.n_queries, selection.n_keys, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for i in range(selection.n_queries):
                t = selection.q_start + i
                anchor = t // r * r
                tile = t // r - selection.q_start // r
                doc = 0 if docs is None else int(docs[b, anchor])
                blocks = {int(j) for j in selection.blocks_BHQN[b, h, tile] if j >= 0}
                blocks |= {s // c for s in range(doc, doc + spec.sinks)}
                keys = {s for j in blocks for s in range(j * c, j * c + c)}
                keys |= set(range(max(0, anchor - spec.window + 1) // c * c, t + 1))
                first = 0 if docs is None else int(docs[b, t])
                mask[b, h, i, [s for s in keys if first <= s <= t]] = True
    return mask


@granularities
@lengths
@documents
def test_dense_mask_is_the_definition(granularity, length, documents):
    selection = make_selection(length, granularity, heads=2, documents=documents)
    assert torch.equal(selection.to_dense_mask(), brute_force(selection))


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (1, 20), (16, 1), (40, 17), (200, 0)])
@granularities
@documents
def test_windows_and_sinks(granularity, window, sinks, documents):
    selection = make_selection(
        100, granularity, window=window, sinks=sinks, budget=80, documents=documents
    )
    mask = selection.to_dense_mask()
    assert torch.equal(mask, brute_force(selection))
    assert torch.equal(mask.sum(-1), selection.attended_BHT())
    assert mask.diagonal(dim1=-2, dim2=-1).all()


@granularities
@lengths
@documents
def test_count_of_attended_keys(granularity, length, documents):
    selection = make_selection(length, granularity, heads=2, documents=documents)
    assert torch.equal(selection.attended_BHT(), selection.to_dense_mask().sum(-1))


@granularities
@lengths
@documents
def test_a_large_budget_is_dense(granularity, length, documents):
    selection = make_selection(length, granularity, budget=10_000, documents=documents)
    full = causal(length, make_documents(length) if documents else None)
    assert torch.equal(selection.to_dense_mask(), full.expand_as(selection.to_dense_mask()))


@granularities
@pytest.mark.parametrize("length", [63, 130])
def test_slots_hold_each_block_once(granularity, length):
    selection = make_selection(length, granularity, documents=True)
    blocks, valid = selection.slots(slice(None))
    for row, ok in zip(blocks.flatten(0, 2), valid.flatten(0, 2)):
        kept = row[ok].tolist()
        assert len(set(kept)) == len(kept)


@granularities
def test_budget_bounds_the_attended_keys(granularity):
    selection = make_selection(130, granularity, budget=60)
    c, r = granularity
    # The window is aligned down to a block, and later queries of a tile see past the anchor.
    assert selection.attended_BHT().max() <= 60 + (c - 1) + (r - 1)


def line_up(granularity, block):
    c, r = granularity
    return block % c == 0 and (block % r == 0 or r % block == 0)


LINED_UP = [(g, b) for g in GRANULARITIES for b in (16, 32, 48) if line_up(g, b)]


@pytest.mark.parametrize(("granularity", "block"), LINED_UP)
@lengths
@documents
def test_layout_covers_the_mask_and_nothing_else_is_needed(granularity, block, length, documents):
    selection = make_selection(length, granularity, heads=2, documents=documents)
    layout = selection.to_layout(block)
    n = -(-length // block)
    assert layout.shape == (2, 2, n, n)
    mask = selection.to_dense_mask()
    pad = n * block - length
    grid = torch.nn.functional.pad(mask, (0, pad, 0, pad)).unflatten(-1, (n, block))
    pairs = grid.unflatten(-3, (n, block)).any(-1).any(-2)
    assert not (pairs & ~layout).any()
    if not documents:
        assert torch.equal(pairs, layout)


FLEX = [(g, b) for g in GRANULARITIES for b in (16, 32, 64) if b % g[0] == 0 and g != (1, 1)]


def mask_of(flex, selection, heads):
    """What a FlexAttention mask says of each pair: [B, heads, T, S]."""
    sizes = (2, heads, selection.n_queries, selection.n_keys)
    b, h, q, k = torch.meshgrid(*(torch.arange(n) for n in sizes), indexing="ij")
    return flex.mask_mod(b, h, q, k)


def cells(mask, block):
    """[B, H, rows, columns, block, block] pairs by cell, padded by repeating nothing."""
    pad = [-n % block for n in mask.shape[-2:]]
    mask = torch.nn.functional.pad(mask, (0, pad[1], 0, pad[0]))
    return mask.unflatten(-1, (-1, block)).unflatten(-3, (-1, block)).transpose(-3, -2)


@pytest.mark.parametrize(("granularity", "block"), FLEX)
@pytest.mark.parametrize("start", [0, 16, 37, 99])
@pytest.mark.parametrize("heads", [1, 2], ids=["shared", "kv"])
@documents
def test_block_mask_is_the_dense_mask(granularity, block, start, heads, documents):
    length = 100
    whole = make_selection(length, granularity, heads=heads, documents=documents, budget=60)
    selection = whole.rows(start, length)
    mask = selection.to_dense_mask()
    flex = selection.to_block_mask(block, heads=4)
    expected = mask.repeat_interleave(4 // heads, 1)
    assert torch.equal(mask_of(flex, selection, 4), expected)
    some = cells(mask, block).any(-1).any(-1)
    assert not (some & ~flex.to_dense().bool()[:, :: 4 // heads]).any()


@pytest.mark.parametrize(("granularity", "block"), FLEX)
@pytest.mark.parametrize("start", [0, 37])
@documents
def test_full_cells_are_full_and_found(granularity, block, start, documents):
    length = 200
    whole = make_selection(length, granularity, documents=documents, budget=150, window=40)
    selection = whole.rows(start, length)
    flex = selection.to_block_mask(block)
    mask = selection.to_dense_mask()
    pad = torch.nn.functional.pad(mask, (0, 0, 0, -mask.shape[2] % block), value=True)
    expected = cells(pad, block).all(-1).all(-1)  # no query there: nothing to mask
    rows, columns = expected.shape[-2:]
    found = torch.zeros(2, 1, rows, columns + 1, dtype=torch.bool)
    index = flex.full_kv_indices.long()
    count = flex.full_kv_num_blocks[..., None]
    index = index.masked_fill(torch.arange(columns) >= count, columns)
    found.scatter_(-1, index, True)
    assert torch.equal(found[..., :-1], expected)
    if granularity == (16, 16) and block == 16 and not documents:
        assert expected.any()


@pytest.mark.parametrize("granularity", [(16, 16), (4, 16), (1, 1)], ids=granularity_id)
@pytest.mark.parametrize("low", [0, 5, 16, 40])
@documents
def test_rows_of_a_selection(granularity, low, documents):
    whole = make_selection(100, granularity, documents=documents)
    part = whole.rows(low, 63)
    assert (part.q_start, part.n_queries, part.n_keys) == (low, 63 - low, 63)
    assert torch.equal(part.to_dense_mask(), whole.to_dense_mask()[:, :, low:63, :63])
    assert torch.equal(part.rows(3, 9).to_dense_mask(), part.to_dense_mask()[:, :, 3:9, : low + 9])


@pytest.mark.parametrize("start", [1, 16, 37])
@pytest.mark.parametrize("block", [16, 32])
def test_layout_rows_begin_at_a_multiple_of_the_block(start, block):
    whole = make_selection(100, (16, 16))
    layout = whole.rows(start, 100).to_layout(block)
    assert torch.equal(layout[:, :, 1:], whole.to_layout(block)[:, :, start // block + 1 :])


def test_layout_of_key_blocks_wider_than_the_cells():
    selection = make_selection(130, (48, 16), window=20)
    pairs = cells(selection.to_dense_mask(), 16).any(-1).any(-1)
    assert torch.equal(selection.to_layout(16), pairs)


def test_views_in_small_chunks(monkeypatch):
    selection = make_selection(130, (4, 16), documents=True)
    layout, mask = selection.to_layout(16), selection.to_block_mask(16)
    monkeypatch.setattr(selection_views, "_CHUNK", 1)
    assert torch.equal(selection.to_layout(16), layout)
    again = selection.to_block_mask(16)
    assert torch.equal(mask_of(again, selection, 1), mask_of(mask, selection, 1))
    assert torch.equal(again.full_kv_num_blocks, mask.full_kv_num_blocks)


def test_views_hold_no_tensor_of_pairs():
    selection = make_selection(2048, (16, 64), budget=300, window=64)
    with LargestTensor() as seen:
        selection.to_block_mask(128)
        selection.to_layout(16)
    slots = selection.slots(slice(None))[0]
    assert seen.largest <= max(slots.numel(), 2 * (2048 // 16) ** 2 + 2) < 2048 * 2048 // 8


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                held = min(leaf.numel(), leaf.untyped_storage().nbytes() // leaf.itemsize)
                self.largest = max(self.largest, held)
        return out


def test_layout_of_a_continued_sequence():
    spec = SelectionSpec(4, 8, window=6, sinks=3)
    layout = tile_layout(spec, n_queries=10, n_keys=40, q_start=21)
    assert layout.anchor_Q.tolist() == [16, 24]
    assert layout.local_BQ.tolist() == [[8, 16]]
    assert (layout.sink_lo_BQ.tolist(), layout.sink_hi_BQ.tolist()) == ([[0, 0]], [[4, 4]])
    assert (layout.n_tiles, layout.n_blocks) == (2, 10)
    expected = [[False, True] + [False] * 8, [False] + [True] * 3 + [False] * 6]
    assert layout.candidates(slice(None), 10)[0].tolist() == expected


def test_layout_follows_the_document_of_the_anchor():
    docs = torch.tensor([[0] * 10 + [10] * 22])
    layout = tile_layout(SelectionSpec(4, 8, window=1, sinks=3), 32, 32, doc_start_BS=docs)
    assert layout.sink_lo_BQ.tolist() == [[0, 0, 8, 8]]
    assert layout.sink_hi_BQ.tolist() == [[4, 4, 16, 16]]


@pytest.mark.parametrize("start", [0, 5, 16, 17, 99])
@granularities
@documents
def test_a_suffix_of_the_queries_has_the_same_rows(granularity, start, documents):
    whole = make_selection(100, granularity, documents=documents)
    first = start // granularity[1]
    part = Selection(
        whole.spec, whole.blocks_BHQN[:, :, first:], 100 - start, 100, start, whole.doc_start_BS
    )
    assert torch.equal(part.to_dense_mask(), whole.to_dense_mask()[:, :, start:])
    assert torch.equal(part.attended_BHT(), whole.attended_BHT()[:, :, start:])


def test_tail_is_the_unfinished_tile():
    selection = make_selection(100, (4, 16))
    tail = selection.tail()
    assert (tail.q_start, tail.n_queries, tail.n_keys) == (96, 4, 100)
    assert torch.equal(tail.blocks_BHQN, selection.blocks_BHQN[:, :, -1:])
    assert make_selection(96, (4, 16)).tail() is None
    assert make_selection(100, (1, 1)).tail() is None


def test_budget_arithmetic():
    spec = SelectionSpec(16, 16, window=20, sinks=17)
    assert spec.sink_keys == 32
    assert [spec.blocks_for(n) for n in (0, 52, 67, 68, 100)] == [0, 0, 0, 1, 3]
    assert spec.max_blocks(10_000, 100) == 5 and spec.max_blocks(68, 100) == 1
    assert spec.max_blocks(10_000, 10) == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [("key_block", 0), ("query_tile", 0), ("window", 0), ("sinks", -1), ("heads", 0)],
)
def test_a_spec_refuses_counts_that_are_too_small(field, value):
    with pytest.raises(ValueError, match=f"{field} must be at least"):
        SelectionSpec(**{field: value})


def test_errors():
    spec = SelectionSpec(4, 8)
    with pytest.raises(ValueError, match="do not lie in"):
        tile_layout(spec, 10, 16, q_start=7)
    with pytest.raises(ValueError, match="do not lie in"):
        tile_layout(spec, 4, 16, q_start=-1)
    for shape in ((1, 1, 3, 2), (1, 2, 2)):
        with pytest.raises(ValueError, match=r"blocks must be .*2 tiles"):
            Selection(spec, torch.zeros(shape, dtype=torch.int32), 16, 16)
    selection = make_selection(63, (4, 16))
    for block in (6, 24):
        with pytest.raises(ValueError, match="does not line up"):
            selection.to_layout(block)
    with pytest.raises(ValueError, match="key blocks of 4 do not line up with cells of 6"):
        selection.to_block_mask(6)
    with pytest.raises(ValueError, match="single queries is T x S"):
        make_selection(63, (1, 1)).to_block_mask()
