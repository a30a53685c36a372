"""Tile sizes of `token` mode's two heavy kernels, each timed in the whole forward or backward.

    python experiments/speed/token_launches.py --memory 256 64 --out token_launches.json

Variants are queries of a union and rows, keys, warps and stages of a step (triton_config.py).
Selections are those of index queries that change slowly, over `memory` positions; a record says
how many times a query's own keys their unions hold. A variant's results are compared with the
first's, and one that does not compile or fit is a record with its error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from triton.runtime.errors import TritonError

from gsa_kernels.bench.case import Shape, make_case
from gsa_kernels.bench.timing import environment, milliseconds
from gsa_kernels.selection import Selection, SelectionSpec
from gsa_kernels.sparse_attention import sparse_attention, triton_config
from gsa_kernels.sparse_attention.triton_union import parts, unite

# Registers and programs per multiprocessor on sm_90 (Triton 3.6, E = 128, 4 heads of 4):
VARIANTS = {
    "forward": [
        (16, 64, 64, 4, 3),  # 166, 2 of 4 warps
        (16, 64, 32, 4, 3),  # 128, 4
        (16, 64, 64, 8, 3),  # 128, 2 of 8 warps
        (32, 128, 32, 8, 3),  # 128, 2 of 8 warps
        (32, 128, 32, 8, 4),  # 128, 2 of 8 warps
        (32, 128, 64, 8, 3),  # 172, 1 of 8 warps
        (32, 128, 32, 16, 3),  # 106, 1 of 16 warps
        (32, 128, 64, 16, 3),  # 124, 1 of 16 warps
    ],
    "query_gradient": [
        (16, 64, 64, 8, 2),  # 254, 1 of 8 warps
        (16, 64, 32, 4, 3),  # 255 and 56 bytes spilled, 2 of 4 warps
        (32, 128, 32, 8, 3),  # 174, 1 of 8 warps
        (32, 128, 32, 8, 2),
        (32, 128, 64, 8, 2),  # 255, 1 of 8 warps
        (32, 128, 64, 8, 3),  # 255 and 8 bytes spilled, 1 of 8 warps
        (32, 128, 32, 16, 3),  # 128 and 32 bytes spilled, 1 of 16 warps
    ],
}


@contextmanager
def launched(name: str, united: int, *sizes: int) -> Iterator[None]:
    """triton_config.<name> gives these sizes for a while, and united_queries the first."""
    before = getattr(triton_config, name), triton_config.united_queries
    setattr(triton_config, name, lambda *_: triton_config.Launch(*sizes))
    triton_config.united_queries = lambda *_: united
    try:
        yield
    finally:
        setattr(triton_config, name, before[0])
        triton_config.united_queries = before[1]


def unions(selection: Selection, group: int) -> float:
    """Keys of the unions over keys that queries chose themselves, sinks left out."""
    bare = replace(selection, spec=replace(selection.spec, sinks=0))
    sizes = [unite(bare, None, False, p, group) for p in parts(bare, 0, group=group)]
    total = sum(int(part.counts_BHU.sum()) for part in sizes)
    return total * group / int((selection.blocks_BHQN >= 0).sum())


def main() -> None:
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path)
    p.add_argument("--seq-len", type=int, default=131072 if cuda else 100)
    p.add_argument("--memory", type=int, nargs="+", default=[256, 64])
    p.add_argument("--heads", type=int, default=16 if cuda else 2)
    p.add_argument("--kv-heads", type=int, default=4 if cuda else 1)
    p.add_argument("--head-dim", type=int, default=128 if cuda else 16)
    p.add_argument("--k", type=int, default=2048 if cuda else 224)
    p.add_argument("--kernels", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    p.add_argument("--seconds", type=float, default=0.3 if cuda else 0.0, help="for each number")
    args = p.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    torch.manual_seed(0)
    report: dict[str, Any] = dict(environment(device))
    report["command"], report["records"] = " ".join(["python", *sys.argv]), []
    window, sinks = (128, 64) if args.seq_len > 1000 else (32, 16)
    spec = SelectionSpec(1, 1, window, sinks)
    for memory in args.memory:
        case = make_case(Shape(
            "token", spec, args.seq_len, args.heads, args.kv_heads, args.head_dim, args.k,
            device, dtype, inputs="smooth", memory=memory,
        ))  # fmt: skip
        selection, tensors = case.choose(), [case.q, case.k, case.v]
        dout = torch.randn_like(case.q)
        sizes_of = {n: unions(selection, n) for n in (16, 32)}

        def forward(selection: Any = selection, tensors: Any = tensors) -> list[torch.Tensor]:
            with torch.no_grad():
                return [sparse_attention(*tensors, selection, impl="triton").out_BTHE]

        leaves = [x.detach().requires_grad_() for x in tensors]
        out = sparse_attention(*leaves, selection, impl="triton").out_BTHE

        def backward(out: Any = out, leaves: Any = leaves, dout: Any = dout) -> list[torch.Tensor]:
            return list(torch.autograd.grad(out, leaves, dout, retain_graph=True))

        calls: dict[str, Callable[[], list[torch.Tensor]]] = {
            "forward": forward,
            "query_gradient": backward,
        }
        for name in args.kernels:
            want = calls[name]()
            for sizes in VARIANTS[name]:
                row: dict[str, Any] = {"memory": memory, "unions": sizes_of[sizes[0]]}
                row |= {"kernel": name, "sizes": sizes}
                report["records"].append(row)
                try:
                    with launched(name, *sizes):
                        row["difference"] = max(map(error, calls[name](), want))
                        row["ms"] = milliseconds(calls[name], device, args.seconds)
                except (RuntimeError, TritonError) as problem:  # the others may fit
                    row["error"] = str(problem).splitlines()[0]
                print(json.dumps(row), flush=True)
                if args.out:
                    args.out.write_text(json.dumps(report, indent=1) + "\n")


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


if __name__ == "__main__":
    main()
