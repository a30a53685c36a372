"""Launches of query gathering: which calls take it, its chunks and buffers."""

import torch
from torch import Tensor

from gsa_kernels.launch import run
from gsa_kernels.selection import Selection
from gsa_kernels.sizes import ceil_div, padded

from . import triton_config as config
from .triton_gather import combine_kernel, gather_kernel
from .triton_residual import lost_bits
from .triton_split import Split, split


def split_choices(
    q: Tensor, k: Tensor, selection: Selection, bias: Tensor | None, need_mass: bool
) -> Split | None:
    """Near and far choices, where gathering the far ones is worth while and possible."""
    if bias is not None or config.gather(q, k, selection) is None:
        return None
    queries, group, slots = q.shape[1], q.shape[2] // k.shape[2], selection.blocks_BHQN.shape[3]
    fitting = config.GATHER_BYTES // _part_bytes(q, group, slots)
    size = config.chunk_of_queries(queries, min(config.GATHER_CHUNK, fitting))
    return split(selection, size, config.GATHER_UNITED, config.GATHER_LONGEST, need_mass)


def _part_bytes(q: Tensor, group: int, slots: int) -> int:
    """Of the parts of a query and key-value head, and of their sums."""
    return slots * group * (q.shape[3] * q.element_size() + 4)


def add_far(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    docs: Tensor | None,
    found: Split,
    near: Tensor,
    lse: Tensor,
    out: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    slot_lse: Tensor | None,
    scale_log2: float,
) -> None:
    """Turn what the union tiles gave of the near choices, near [B, T, H, E] and lse [B, H, T],
    into the result: out, gated, and lse; near becomes the ungated output if it is not out itself,
    and its residual, which makes near more exact, that of the ungated output.
    The sums of the far choices go to slot_lse [B, H, T, N], after those of the near ones.
    """
    (batch, queries, heads, width), keys, kv_heads = q.shape, k.shape[1], k.shape[2]
    groups, chunks, most = found.items_BHQM3.shape[1:4]
    group, slots = heads // kv_heads, found.near.blocks_BHQN.shape[3]
    size, c = found.size, found.near.spec.key_block
    launch = config.gather(q, k, found.near)
    assert launch is not None
    lines = config.lines_of_parts(batch * kv_heads, size * _part_bytes(q, group, slots))
    parts = torch.empty(lines, size, slots, group, width, device=q.device, dtype=q.dtype)
    sums = torch.empty(parts.shape[:-1], device=q.device, dtype=torch.float32)
    constants = dict(H=heads, K=kv_heads, HS=groups, E=width, BE=padded(width), N=slots)
    nears, fars = found.counts_2BHT.unbind()
    # Chunks of one line in turn: neighbours choose the same blocks, still in the L2 then.
    for first in range(0, batch * kv_heads, lines):
        across = min(lines, batch * kv_heads - first)
        for chunk in range(chunks):
            run(
                gather_kernel, (most, across),
                q, k, v, fars if docs is None else docs,
                found.places_BHL, found.items_BHQM3, found.used_BHQ, parts, sums,
                queries, keys, found.near.q_start, chunks, most, chunk, size, first, scale_log2,
                **constants, C=c, BM=launch.rows, HAS_DOCS=docs is not None,
                STAGES=launch.stages,
                num_warps=launch.warps, maxnreg=launch.registers,
            )  # fmt: skip
            run(
                combine_kernel, (ceil_div(size, launch.combined // group), across),
                parts, sums, near, out if gate is None else gate, out,
                out if residual is None else residual, lse,
                lse if slot_lse is None else slot_lse, nears, fars,
                queries, chunk, size, first,
                **constants, BM=launch.combined, BN=32, HAS_MASS=slot_lse is not None,
                GATE=0 if gate is None else gate.shape[3], KEEP=near is not out,
                LOST=0 if residual is None else lost_bits(q.dtype),
            )  # fmt: skip
