"""Launches of query gathering: which calls take it, its chunks and buffers."""

from itertools import product

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
    launch = config.gather(q, k, selection)
    if bias is not None or launch is None:
        return None
    queries, group, slots = q.shape[1], q.shape[2] // k.shape[2], selection.blocks_BHQN.shape[3]
    fitting = config.bytes_of_parts(q) // _part_bytes(q, group, slots)
    narrow = ((1 << 31) - 1) // q[0, 0].numel()  # offsets inside a chunk are of 32 bits
    size = config.chunk_of_queries(queries, min(config.GATHER_CHUNK, fitting, narrow))
    near, longest = config.GATHER_UNITED, config.GATHER_LONGEST
    return split(selection, size, near, longest, need_mass, launch.pairs is not None)


def _part_bytes(q: Tensor, group: int, slots: int) -> int:
    """Of the parts of a query and key-value head, and of their sums."""
    return slots * group * (q.shape[3] * q.element_size() + 8)


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
    groups, chunks, kinds, most = found.items_BHQDM3.shape[1:5]
    group, slots = heads // kv_heads, found.near.blocks_BHQN.shape[3]
    size, c = found.size, found.near.spec.key_block
    launch = config.gather(q, k, found.near)
    assert launch is not None
    lines = batch * kv_heads
    each = size * _part_bytes(q, group, slots)
    held = max(1, min(lines, config.bytes_of_parts(q) // each))  # lines at once
    parts = torch.empty(held, size, slots, group, width, device=q.device, dtype=q.dtype)
    sums = torch.empty(*parts.shape[:-1], 2, device=q.device, dtype=torch.float32)
    mass = slot_lse is not None
    logs = torch.empty(sums.shape[:-1], device=q.device) if mass else sums
    constants = dict(H=heads, K=kv_heads, HS=groups, E=width, BE=padded(width), N=slots)
    constants |= dict(HAS_MASS=mass)
    nears, fars, pairs = found.counts_3BHT.unbind()
    steps = [(launch.singles, False)]
    if launch.pairs is not None:
        steps.append((launch.pairs, True))
    # Chunks of the same lines in turn: neighbours choose the same blocks, still in the L2 then.
    stages = list(product(range(0, lines, held), range(chunks)))
    # Tickets of a launch begin at 16 bytes, else it would not be a short one (see launch.py).
    tickets = torch.zeros(
        len(stages), kinds, 4 * ceil_div(held, 4), device=q.device, dtype=torch.int32
    )
    for (first, chunk), row in zip(stages, tickets):
        across = min(held, lines - first)
        for (step, paired), ticket in zip(steps, row):
            run(
                gather_kernel, (min(most, step.programs), across),
                q, k, v, fars if docs is None else docs,
                found.places_BHL, found.items_BHQDM3, found.used_BHQD, pairs,
                parts, sums, logs, ticket,
                queries, keys, found.near.q_start, chunks, most, chunk, size, first, scale_log2,
                **constants, C=c, BM=step.rows, D=kinds, PAIR=paired, HAS_DOCS=docs is not None,
                STAGES=step.stages, num_warps=step.warps, maxnreg=step.registers,
            )  # fmt: skip
        run(
            combine_kernel, (ceil_div(size, launch.combined // group), across),
            parts, sums, logs, near, out if gate is None else gate, out,
            out if residual is None else residual, lse, lse if slot_lse is None else slot_lse,
            nears, fars, pairs, queries, chunk, size, first,
            **constants, BM=launch.combined, BN=32, GATE=0 if gate is None else gate.shape[3],
            KEEP=near is not out, LOST=0 if residual is None else lost_bits(q.dtype),
        )  # fmt: skip
