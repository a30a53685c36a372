"""Launches of the backward of chosen blocks by query gathering: sizes, buffers, grids."""

from itertools import product

import torch
from torch import Tensor

from gsa_kernels.launch import run
from gsa_kernels.selection import Selection
from gsa_kernels.sizes import ceil_div, padded, power_of_2

from . import triton_config as config
from .gather_lists import gather_lists
from .triton_gather_backward import parts_kernel, sum_kernel

LOG2E = 1.4426950408889634


def gathers(selection: Selection) -> bool:
    """Whether the backward of the chosen blocks is to gather queries."""
    spec = selection.spec
    return (
        spec.query_tile == 1
        and spec.key_block in (16, 32, 64, 128)
        and selection.blocks_BHQN.shape[3] > 0
        and selection.n_queries >= config.GATHER_BACKWARD_FROM
    )


def chunk_of(queries: int, heads: int, kv_heads: int, width: int, slots: int) -> int:
    """Queries of a chunk: the parts of one key-value head are bounded by q's memory, so a block is
    chosen by about H C rows of the chunks; and offsets inside a chunk are of 32 bits."""
    fitting = ((1 << 31) - 1) // (width * max(slots * heads // kv_heads, 2 * heads))
    most = int(config.GATHERED_PARTS * queries * kv_heads) // slots
    return config.chunk_of_queries(queries, min(most, fitting))


def add_chosen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    selection: Selection,
    docs: Tensor | None,
    scale: float,
) -> None:
    """Add what the chosen blocks give to dq [B, T, H, E] and to dk, dv [B, S, K, E] float32.

    dout: gradient of the ungated output; lse, delta [B, H, T] float32, of all keys. scale >= 0.
    All contiguous; docs int32.
    """
    batch, queries, heads, width = q.shape
    kv_heads, keys, slots = k.shape[2], k.shape[1], selection.blocks_BHQN.shape[3]
    group, spec = heads // kv_heads, selection.spec
    launch = config.gathered_gradient(group, spec.key_block, width, q.element_size(), q.device)
    size = chunk_of(queries, heads, kv_heads, width, slots)
    lists = gather_lists(selection, size, max(1, launch.longest // group))
    parts = torch.empty(batch, size * slots, group, width, device=q.device, dtype=q.dtype)
    # One load each, and what a query's heads need side by side.
    sums = torch.stack((lse * LOG2E, delta), -1).transpose(1, 2).contiguous()
    items, rows = lists.items.shape[2], max(power_of_2(group), config.SUMMED_ROWS)
    constants = dict(
        H=heads, K=kv_heads, HS=selection.blocks_BHQN.shape[1], E=width, BE=padded(width), N=slots
    )
    for kv_head, chunk in product(range(kv_heads), range(lists.chunks)):
        run(
            parts_kernel, (items, batch),
            q, k, v, dout, sums, lists.items if docs is None else docs, dk, dv,
            lists.queries, lists.items, parts,
            queries, keys, selection.q_start, lists.queries.shape[2], items,
            lists.chunks, chunk, size, kv_head, scale, max(scale, 1e-30) * LOG2E,
            **constants, C=spec.key_block, BM=launch.rows, HAS_DOCS=docs is not None,
            STAGES=launch.stages, num_warps=launch.warps,
        )  # fmt: skip
        here = min(size, queries - chunk * size)
        run(
            sum_kernel, (ceil_div(here, rows // group), batch),
            lists.entries, parts, dq, queries, lists.chunks, chunk, size, kv_head, scale,
            **constants, BN=power_of_2(slots), BM=rows,
        )  # fmt: skip
