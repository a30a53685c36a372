"""Hypothesis strategies shared by property tests: granularities, documents, selections."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from gsa_kernels.selection import Selection, SelectionSpec, tile_layout

KINDS = ("random", "full", "clustered", "popular", "last", "empty")


def few(examples: int) -> settings:
    """The same examples at every run, none of them on a clock."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def specs(draw: st.DrawFn, blocks: tuple[int, ...], tiles: tuple[int, ...]) -> SelectionSpec:
    """Key blocks and query tiles of these sizes, a short window, sinks, 1 or 2 selection heads."""
    return SelectionSpec(
        draw(st.sampled_from(blocks)),
        draw(st.sampled_from(tiles)),
        window=draw(st.sampled_from((1, 2, 5, 16, 17, 24))),
        sinks=draw(st.sampled_from((0, 1, 5, 20))),
        heads=draw(st.sampled_from((1, 2))),
    )


def lengths(longest: int) -> st.SearchStrategy[int]:
    """Mostly long enough for something to choose from; 1 and 2 sometimes."""
    return st.sampled_from((1, 2, *range(longest * 2 // 3, longest + 1)))


@st.composite
def documents(draw: st.DrawFn, batch: int, length: int) -> Tensor | None:
    """[B, T] first position of each position's document, or None."""
    if draw(st.sampled_from((True, True, False))):
        return None
    rows = []
    for _ in range(batch):
        row = torch.zeros(length, dtype=torch.long)
        for start in sorted(draw(st.sets(st.integers(0, length - 1), max_size=3))):
            row[start:] = start
        rows.append(row)
    return torch.stack(rows)


@st.composite
def selections(draw: st.DrawFn, spec: SelectionSpec, batch: int, length: int) -> Selection:
    """A choice of the kind drawn, from the candidates of each tile.

    random: any subset; empty, full; clustered: one run; popular: the first ones, the same for all
    tiles that have them; last: the one before the window. Lists may be wider than what they hold.
    """
    docs = draw(documents(batch, length))
    layout = tile_layout(spec, length, length, 0, docs, "cpu")
    allowed = layout.candidates(slice(None), layout.n_blocks).expand(batch, -1, -1)
    kind, seed = draw(st.sampled_from(KINDS)), draw(st.integers(0, 1 << 30))
    g = torch.Generator().manual_seed(seed)
    lists = []
    for b in range(batch):
        for _ in range(spec.heads):
            for tile in allowed[b]:
                found = tile.nonzero().flatten()
                n = len(found)
                if kind == "random" or (kind == "clustered" and n):
                    keep = torch.rand(n, generator=g) < torch.rand(1, generator=g)
                    if kind == "clustered":
                        low = int(torch.randint(n, (1,), generator=g))
                        keep = torch.arange(n).sub(low).clamp_min(-1).lt(3) & (
                            torch.arange(n) >= low
                        )
                    found = found[keep]
                elif kind == "empty":
                    found = found[:0]
                elif kind == "popular":
                    found = found[:2]
                elif kind == "last":
                    found = found[-1:]
                lists.append(found)
    width = max(map(len, lists)) + draw(st.integers(0, 2))
    blocks = torch.full((len(lists), width), -1, dtype=torch.int32)
    for row, found in zip(blocks, lists, strict=True):
        row[: len(found)] = found
    shape = (batch, spec.heads, layout.n_tiles, width)
    return Selection(spec, blocks.view(shape), length, length, 0, docs)


def last_queries(selection: Selection, start: int) -> Selection:
    """The same choice for queries from `start` on."""
    first = start // selection.spec.query_tile
    length = selection.n_keys
    blocks = selection.blocks_BHQN[:, :, first:]
    docs = selection.doc_start_BS
    return Selection(selection.spec, blocks, length - start, length, start, docs)
