"""Lists of tiles by key block, and tables of tiles, against plain tensor operations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import granularity_id, make_selection

pytest.importorskip("triton")

pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
granularities = pytest.mark.parametrize(
    "granularity", [(16, 16), (32, 48), (4, 16), (16, 1)], ids=granularity_id
)
documents = pytest.mark.parametrize("documents", [False, True], ids=["one_doc", "docs"])


def on_device(selection):
    docs = selection.doc_start_BS
    return replace(
        selection,
        blocks_BHQN=selection.blocks_BHQN.to(DEVICE).contiguous(),
        doc_start_BS=None if docs is None else docs.to(DEVICE, torch.int32).contiguous(),
    )


def expected(selection, longest):
    """For each sequence and head: (tiles, places) of each key block, and its segments."""
    blocks, valid = (x[..., : -selection.spec.local_slots] for x in selection.slots(slice(None)))
    width = selection.blocks_BHQN.shape[-1]
    for lines, ok in zip(blocks.flatten(0, 1).tolist(), valid.flatten(0, 1).tolist()):
        entries = [[] for _ in range(selection.layout.n_blocks)]
        for tile, (line, there) in enumerate(zip(lines, ok)):
            for slot, block in enumerate(line):
                if there[slot]:
                    own = slot - selection.sink_slots
                    entries[block].append((tile, tile * width + own if own >= 0 else -1))
        segments, start = [], 0
        for block, tiles in enumerate(entries):
            for part in range(max(1, -(-len(tiles) // longest))):
                last = min(start + (part + 1) * longest, start + len(tiles))
                segments.append([block, start + part * longest, last, part])
            start += len(tiles)
        yield [x for tiles in entries for x in tiles], segments


@granularities
@documents
@pytest.mark.parametrize("start", [0, 33])
@pytest.mark.parametrize("longest, scratch", [(2, 64), (2000, 1 << 20)])
def test_each_block_lists_its_tiles_in_order(
    granularity, documents, start, longest, scratch, monkeypatch
):
    from gsa_kernels.sparse_attention import triton_inverted

    monkeypatch.setattr(triton_inverted, "_SCRATCH", scratch)
    length = 200 if granularity[1] > 1 else 70
    selection = make_selection(length, granularity, documents=documents)
    selection = on_device(selection.rows(start, length))
    lists = triton_inverted.invert(selection, longest, True)
    found = (lists.tiles_BHL, lists.places_BHL, lists.segments_BHG4)
    found = zip(*(x.flatten(0, 1).tolist() for x in found), strict=True)
    seen = 0
    for (tiles, places, table), (entries, segments) in zip(
        found, expected(selection, longest), strict=True
    ):
        assert list(zip(tiles, places))[: len(entries)] == entries
        assert table[: len(segments)] == segments
        assert all(row[0] == -1 for row in table[len(segments) :])
        seen += len(entries)
    assert seen >= 4


@granularities
@documents
@pytest.mark.parametrize("start", [0, 33])
def test_tables_of_tiles(granularity, documents, start):
    from gsa_kernels.sparse_attention.triton_tiles import tile_table

    rows = granularity[1]
    selection = on_device(make_selection(100, granularity, documents=documents).rows(start, 100))
    counts, sinks = tile_table(selection, 16 if rows == 1 else rows, rows == 1)
    layout = selection.layout
    want = torch.stack([layout.sink_lo_BQ, layout.sink_hi_BQ], -1)
    if rows == 1:  # of every 16th position, and of the first query
        first = torch.arange(start // 16 * 16, 100, 16).clamp_min(start) - start
        want = want[:, first.to(DEVICE)]
        assert counts is None
    else:
        assert torch.equal(counts.long(), selection.counts_BHQ)
    assert torch.equal(sinks.long(), want)
