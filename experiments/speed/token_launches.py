"""Tile sizes of `token` mode's two heavy kernels, each timed in the whole forward or backward.

    python experiments/speed/token_launches.py --unions 2 4 --out token_launches.json

Variants are rows, keys, warps and stages of a step (triton_config.py), the present one first.
Selections are those of token_attention.py. A variant's results are compared with the first's, and
one that does not compile or fit is a record with its error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from token_attention import drawn
from triton.runtime.errors import TritonError

from gsa_kernels.bench.timing import environment, milliseconds
from gsa_kernels.sparse_attention import sparse_attention, triton_config

# Registers and programs per multiprocessor on sm_90 (Triton 3.6, E = 128, 4 heads of 4):
VARIANTS = {
    "forward": [
        (64, 64, 4, 3),  # 166, 2 of 4 warps
        (64, 32, 4, 3),  # 128, 4
        (64, 32, 8, 3),  # 112, 2 of 8 warps
        (64, 64, 8, 3),  # 128, 2 of 8 warps
        (64, 128, 8, 3),  # 218, 1 of 8 warps
    ],
    "query_gradient": [
        (64, 64, 8, 2),  # 254, 1 of 8 warps
        (64, 64, 8, 3),  # 255, 1 of 8 warps
        (64, 32, 4, 2),  # 255 and 40 bytes spilled, 2 of 4 warps
        (64, 32, 4, 3),  # 255 and 56 bytes spilled, 2 of 4 warps
        (64, 32, 8, 3),  # 182, 1 of 8 warps
    ],
}


@contextmanager
def launched(name: str, sizes: tuple[int, int, int, int]) -> Iterator[None]:
    """triton_config.<name> gives these sizes for a while."""
    before = getattr(triton_config, name)
    setattr(triton_config, name, lambda *_: triton_config.Launch(*sizes))
    try:
        yield
    finally:
        setattr(triton_config, name, before)


def main() -> None:
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path)
    p.add_argument("--seq-len", type=int, default=131072 if cuda else 100)
    p.add_argument("--unions", type=float, nargs="+", default=[2, 4])
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
    heads = (args.heads, args.kv_heads, args.kv_heads)
    tensors = [
        torch.randn(1, args.seq_len, h, args.head_dim, device=device, dtype=dtype)
        for h in heads
    ]  # fmt: skip
    dout = torch.randn_like(tensors[0])
    report: dict[str, Any] = dict(environment(device))
    report["command"], report["records"] = " ".join(["python", *sys.argv]), []
    for inflation in args.unions:
        selection = drawn(args.seq_len, args.k, inflation, device)

        def forward(selection: Any = selection) -> list[torch.Tensor]:
            with torch.no_grad():
                return [sparse_attention(*tensors, selection, impl="triton").out_BTHE]

        leaves = [x.detach().requires_grad_() for x in tensors]
        out = sparse_attention(*leaves, selection, impl="triton").out_BTHE

        def backward(out: Any = out, leaves: Any = leaves) -> list[torch.Tensor]:
            return list(torch.autograd.grad(out, leaves, dout, retain_graph=True))

        calls: dict[str, Callable[[], list[torch.Tensor]]] = {
            "forward": forward,
            "query_gradient": backward,
        }
        for name in args.kernels:
            want = calls[name]()
            for sizes in VARIANTS[name]:
                row: dict[str, Any] = {"unions": inflation, "kernel": name, "sizes": sizes}
                report["records"].append(row)
                try:
                    with launched(name, sizes):
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
