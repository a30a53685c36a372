"""What query gathering takes where nothing is multiplied: a floor of `block` mode's forward.

    python experiments/speed/gather_traffic.py layer0.npz layer1.npz --out gather_traffic.json

Programs walk the same lists as `gather_kernel`, as many of them as fit, and only move data: the
keys and values of a block or pair, the queries that chose it, and as much as their parts, which is
written to the same places. Beside it the kernels themselves, without pairs and with them, and the
rate of memory, at which parts could be added up. Files of lists: see lists.py; other inputs are
random.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from query_gathering import constants, selection_of
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gsa_kernels.bench.case import Shape, make_case
from gsa_kernels.bench.timing import environment, rates
from gsa_kernels.selection import SelectionSpec
from gsa_kernels.sparse_attention import gather_launch, sparse_attention
from gsa_kernels.sparse_attention.triton_split import Split

PROGRAMS = 8  # of a multiprocessor


@triton.jit
def move_kernel(
    q_ptr,  # [T, K, G E]
    k_ptr,  # [S, K, E]
    v_ptr,
    place_ptr,  # of a chunk
    item_ptr,  # of a chunk and kind
    used_ptr,
    part_ptr,  # [size, N, G E]
    kept_ptr,  # keeps the loads of keys
    ticket_ptr,
    start,
    head,
    K: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    N: tl.constexpr,
    KEYS: tl.constexpr,
    C: tl.constexpr,
    BQ: tl.constexpr,
):
    used = tl.load(used_ptr)
    c, e, i, row = tl.arange(0, KEYS), tl.arange(0, E), tl.arange(0, BQ), tl.arange(0, G * E)
    item = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
    while item < used:
        block = tl.load(item_ptr + item * 3)
        first, last = tl.load(item_ptr + item * 3 + 1), tl.load(item_ptr + item * 3 + 2)
        at = ((block * C + c).to(tl.int64) * K + head)[:, None] * E + e
        keys = tl.load(k_ptr + at).to(tl.float32) + tl.load(v_ptr + at)
        tl.store(kept_ptr + c, tl.max(keys, 1))
        for low in tl.range(first, last, BQ, num_stages=3):
            there = (low + i < last)[:, None]
            slot = tl.load(place_ptr + low + i, mask=low + i < last, other=0).to(tl.int64)
            q_at = ((start + slot // N) * K + head)[:, None] * (G * E) + row
            q = tl.load(q_ptr + q_at, mask=there, other=0.0)
            tl.store(part_ptr + slot[:, None] * (G * E) + row, q, mask=there)
        item = tl.atomic_add(ticket_ptr, 1, sem="relaxed")


def move(q: Tensor, k: Tensor, v: Tensor, found: Split, parts: Tensor, kept: Tensor) -> None:
    heads, e, kv_heads = *q.shape[2:], k.shape[2]
    slots, c = found.near.blocks_BHQN.shape[3], found.near.spec.key_block
    chunks, kinds, _, _ = found.items_BHQDM3.shape[2:]
    programs = 1
    if q.is_cuda:
        programs = PROGRAMS * torch.cuda.get_device_properties(q.device).multi_processor_count
    tickets = torch.zeros(kv_heads, chunks, kinds, device=q.device, dtype=torch.int32)
    for head, chunk, kind in product(range(kv_heads), range(chunks), range(kinds)):
        move_kernel[(programs,)](
            q, k, v, found.places_BHL[0, 0, chunk * found.size * slots :],
            found.items_BHQDM3[0, 0, chunk, kind], found.used_BHQD[0, 0, chunk, kind:],
            parts, kept, tickets[head, chunk, kind:], chunk * found.size, head,
            K=kv_heads, G=heads // kv_heads, E=e, N=slots, KEYS=c << kind, C=c, BQ=16,
        )  # fmt: skip


def kernel_times(call: Any, device: torch.device, times: int = 3) -> dict[str, float]:
    """Milliseconds of each kernel of a call."""
    cuda = device.type == "cuda"
    call()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        for _ in range(times):
            call()
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = {e.key: getattr(e, field) / 1e3 / times for e in found.key_averages()}
    return dict(sorted(rows.items(), key=lambda row: -row[1])[:12])


def main() -> None:
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("lists", nargs="+", type=Path)
    p.add_argument("--out", type=Path)
    p.add_argument("--heads", type=int, default=16)
    p.add_argument("--kv-heads", type=int, default=4)
    p.add_argument("--head-dim", type=int, default=128)
    p.add_argument("--key-block", type=int, default=64)
    args = p.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    torch.manual_seed(0)
    spec = SelectionSpec(args.key_block, 1, 128, 64)
    report: dict[str, Any] = dict(environment(device))
    report["command"], report["records"] = " ".join(["python", *sys.argv]), []
    report["copy_bytes_s"] = memory = rates(device, dtype).bytes_s
    for file in args.lists:
        selection = selection_of(file, spec, device)
        case = make_case(Shape(
            "block", spec, selection.n_queries, args.heads, args.kv_heads, args.head_dim, 2048,
            device, dtype, impl="triton",
        ))  # fmt: skip
        q, k, v = case.q, case.k, case.gated_values.detach()
        for paired in (0, 1):
            with constants(pairs=paired, **{"from": 0}), torch.no_grad():
                found = gather_launch.split_choices(q, k, selection, None, False)
                assert found is not None
                counts = found.counts_3BHT.sum((1, 2, 3), dtype=torch.int64).tolist()
                group = args.heads // args.kv_heads
                shape = (found.size, selection.blocks_BHQN.shape[3], group * args.head_dim)
                parts = torch.empty(*shape, device=device, dtype=dtype)
                kept = torch.empty(2 * args.key_block, device=device)
                # Of the kernels: their launches can take the host longer.
                moved = kernel_times(partial(move, q, k, v, found, parts, kept), device)
                attend = partial(sparse_attention, q, k, v, selection, impl="triton")
                kernels = kernel_times(attend, device)
            written = (counts[1] - counts[2]) * q[0, 0].numel() * q.element_size()
            row = {"lists": file.name, "pairs": paired, "far_choices": counts[1]}
            row |= {"pairs_found": counts[2], "part_bytes": written}
            row["moved_ms"] = moved["move_kernel"] if cuda else sum(moved.values())
            row["added_ms"] = (written + 2 * q.numel() * q.element_size()) / (memory / 1e3)
            row["kernels_ms"] = kernels
            report["records"].append(row)
            print(json.dumps(row), flush=True)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
