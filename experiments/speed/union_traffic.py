"""What fetching the keys of unions and adding to them costs alone: a floor of `token` mode.

    python experiments/speed/union_traffic.py --out union_traffic.json

Programs walk the unions of 16 or 32 queries as the forward and dq do, of index queries that change
slowly, but multiply nothing: they load a key and a value of each entry, add float32 numbers to the
gradients of both atomically, or do both.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from gsa_kernels.bench.case import Shape, make_case
from gsa_kernels.bench.timing import environment, milliseconds
from gsa_kernels.selection import SelectionSpec
from gsa_kernels.sparse_attention.triton_union import Unions, parts, unite


@triton.jit
def walk_kernel(
    k_ptr,  # [S, K, E]
    v_ptr,
    dk_ptr,  # [S, K, E] float32
    dv_ptr,
    list_ptr,  # [groups, U] int32
    count_ptr,  # [groups] int32
    total_ptr,  # [groups, K] float32: keeps the loads
    U,
    K: tl.constexpr,
    E: tl.constexpr,
    BN: tl.constexpr,
    LOAD: tl.constexpr,
    ADD: tl.constexpr,
):
    group, head = tl.program_id(0), tl.program_id(1)
    count = tl.load(count_ptr + group)
    e = tl.arange(0, E)
    total = tl.zeros([BN, E], tl.float32)
    for first in tl.range(0, count, BN, num_stages=3):
        n = first + tl.arange(0, BN)
        key = tl.load(list_ptr + group.to(tl.int64) * U + n, mask=n < count, other=0)
        at = (key.to(tl.int64) * K + head)[:, None] * E + e
        if LOAD:
            total += tl.load(k_ptr + at).to(tl.float32) + tl.load(v_ptr + at)
        if ADD:
            some = tl.zeros([BN, E], tl.float32) + first
            there = (n < count)[:, None]
            tl.atomic_add(dk_ptr + at, some, mask=there, sem="relaxed")
            tl.atomic_add(dv_ptr + at, some, mask=there, sem="relaxed")
    tl.store(total_ptr + group * K + head, tl.sum(tl.sum(total, 0), 0))


def walk(tensors: list[torch.Tensor], unions: list[Unions], load: bool, add: bool) -> None:
    for union in unions:
        lists, counts = union.lists_BHUN, union.counts_BHU
        groups, heads, width = counts.shape[2], tensors[0].shape[1], tensors[0].shape[2]
        total = torch.empty(groups, heads, device=lists.device)
        walk_kernel[(groups, heads)](
            *tensors, lists, counts, total, lists.shape[3], K=heads, E=width, BN=32,
            LOAD=load, ADD=add,
        )  # fmt: skip


def main() -> None:
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path)
    p.add_argument("--seq-len", type=int, default=131072 if cuda else 100)
    p.add_argument("--memory", type=int, default=256)
    p.add_argument("--kv-heads", type=int, default=4 if cuda else 1)
    p.add_argument("--head-dim", type=int, default=128 if cuda else 16)
    p.add_argument("--k", type=int, default=2048 if cuda else 64)
    p.add_argument("--seconds", type=float, default=0.2 if cuda else 0.0, help="for each number")
    args = p.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    window, sinks = (128, 64) if args.seq_len > 1000 else (32, 16)
    case = make_case(Shape(
        "token", SelectionSpec(1, 1, window, sinks), args.seq_len, args.kv_heads, args.kv_heads,
        args.head_dim, args.k, device, dtype, inputs="smooth", memory=args.memory,
    ))  # fmt: skip
    selection, k, v = case.choose(), case.k[0], case.v[0]
    tensors = [k, v, *torch.zeros(2, *k.shape, device=device)]
    report: dict[str, Any] = dict(environment(device))
    report["command"], report["records"] = " ".join(["python", *sys.argv]), []
    for group in (16, 32):
        unions = [
            unite(selection, None, False, part, group) for part in parts(selection, 0, group=group)
        ]
        entries = sum(int(union.counts_BHU.sum()) for union in unions)
        for load, add in ((True, False), (False, True), (True, True)):
            ms = milliseconds(partial(walk, tensors, unions, load, add), device, args.seconds)
            each = 2 * (load * k.element_size() + add * 4)
            row = {"queries": group, "entries": entries, "load": load, "add": add, "ms": ms}
            row["bytes_s"] = entries * args.kv_heads * args.head_dim * each / ms * 1e3
            report["records"].append(row)
            print(json.dumps(row), flush=True)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
