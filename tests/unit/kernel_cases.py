"""Inputs shared by the tests of the kernels: index factors, documents, granularities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gsa_kernels.index_score.api import IndexFactors
from gsa_kernels.select.api import select
from gsa_kernels.selection import Selection, SelectionSpec

# (C keys per block, R queries per tile): token, block and tile mode, then awkward combinations.
GRANULARITIES = [(1, 1), (16, 1), (16, 16), (4, 16), (8, 32), (16, 12), (5, 7)]
LENGTHS = [1, 63, 100, 130]
STARTS = ([0, 20, 21, 50], [0, 37, 90])  # documents of the two sequences of a batch


def granularity_id(value: tuple[int, int]) -> str:
    return f"C{value[0]}R{value[1]}"


def captured_in_a_graph(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """(a CUDA graph of the step, what it writes when it is replayed). Fails where the step waits
    for the device."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured


def make_factors(
    length: int,
    *,
    batch: int = 2,
    index_heads: int = 4,
    width: int = 8,
    heads: int = 1,
    activation: str = "sigmoid",
    block_score: str = "mean",
    seed: int = 0,
) -> IndexFactors:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return IndexFactors(
        draw(batch, length, index_heads, width),
        draw(batch, length, width),
        draw(batch, length, index_heads).sigmoid(),
        draw(index_heads),
        width**-0.5,
        activation,
        block_score,
        heads,
    )


def make_documents(length: int) -> Tensor:
    """[2, T] first position of each position's document."""
    rows = []
    for starts in STARTS:
        row = torch.zeros(length, dtype=torch.long)
        for start in starts:
            row[start:] = start
        rows.append(row)
    return torch.stack(rows)


def make_selection(
    length: int,
    granularity: tuple[int, int],
    *,
    window: int = 7,
    sinks: int = 3,
    budget: int = 45,
    heads: int = 1,
    documents: bool = False,
    seed: int = 0,
) -> Selection:
    spec = SelectionSpec(*granularity, window=window, sinks=sinks, heads=heads)
    docs = make_documents(length) if documents else None
    factors = make_factors(length, heads=heads, seed=seed)
    return select(factors, spec, budget, budget, length, docs).selection


def causal(length: int, docs: Tensor | None) -> Tensor:
    """[B or 1, 1, T, T] bool of full attention inside documents."""
    position = torch.arange(length)
    mask = (position <= position[:, None])[None]
    if docs is not None:
        mask = mask & (position >= docs[..., None])
    return mask[:, None]
