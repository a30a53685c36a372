"""Backward of queries that choose their own blocks (R = 1): query gathering beside union tiles.

    python experiments/speed/block_backward.py --inputs smooth --out block_backward.json
    python experiments/speed/block_backward.py --lists FILE.npz ...    # a captured selection

FILE.npz holds `blocks` [T, N] int16, padded with -1. Gradients of every variant are checked
against those of the union tiles at the full length. `whole` is a backward, `graph` a CUDA graph of
it; then its parts one by one: window and sinks, lists, the gathering, the sums of the parts of dq.

Predicted for T = 131072, H = 16, K = 4, E = 128, C = 64, 29 blocks chosen by each query: 3.8 M
choices, 60.8 M rows of (query, head, block), a product of matrices over all of them is 1.0 TFLOP.

- Union tiles: dq by unions computes 2.9 to 5.5 times the pairs attended (three products), dk and
  dv by lists compute each pair once (four products: 12 ms, 330 TFLOP/s). 28 to 42 ms by layer.
- Gathering: five products of each pair, 1.02 to 1.04 times the pairs computed (lists of about 410
  queries in a chunk of 16384). Tensor cores at the rate of dk, dv: 15 ms; shared memory: 970
  cycles a step of 32 rows, 8 ms (64 rows: 1540, 6.5 ms), under it. L2: 31 GB of q and dO read, 16
  GB of parts written: 8.5 ms at 5.5 TB/s, under it. Memory: 16 GB of parts written, under it too.
- Sums: 16 GB of parts read at 4 TB/s: 4 ms. Atomics: 13 k items x 4 heads x 64 KB: 3.5 GB, 2 ms if
  not hidden. Window and sinks 2.5 ms, lists 1 ms. In all 23 to 25 ms, for every layer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime.errors import TritonError

from gsa_kernels.bench.case import Case, Shape, make_case
from gsa_kernels.bench.timing import (
    environment,
    graph_milliseconds,
    host_milliseconds,
    milliseconds,
    peak_bytes,
)
from gsa_kernels.selection import Selection, SelectionSpec
from gsa_kernels.sparse_attention import gather_backward, triton_config, triton_launch
from gsa_kernels.sparse_attention.triton_config import GatherLaunch

Launch = triton_config.GatherLaunch
# Launch, memory of parts over that of q, rows of a sum.
VARIANTS: dict[str, tuple[GatherLaunch, float, int]] = {
    "32 rows, 5 stages": (Launch(32, 4, 5), 1.0, 32),
    "32 rows, 3 stages": (Launch(32, 4, 3), 1.0, 32),
    "64 rows, 3 stages": (Launch(64, 4, 3), 1.0, 32),
    "32 rows, half the chunk": (Launch(32, 4, 5), 0.5, 32),
    "32 rows, items of 1024": (Launch(32, 4, 5, longest=1024), 1.0, 32),
    "32 rows, items of 4096": (Launch(32, 4, 5, longest=4096), 1.0, 32),
    "sums of 16 rows": (Launch(32, 4, 5), 1.0, 16),
    "sums of 64 rows": (Launch(32, 4, 5), 1.0, 64),
}
NAMES = ("dq", "dk", "dv")


@contextmanager
def variant(launch: GatherLaunch, share: float, rows: int) -> Iterator[None]:
    """The backward gathers, by this launch."""
    held = {
        "gathered_gradient": triton_config.gathered_gradient,
        "GATHERED_PARTS": triton_config.GATHERED_PARTS,
        "SUMMED_ROWS": triton_config.SUMMED_ROWS,
        "GATHER_BACKWARD_FROM": triton_config.GATHER_BACKWARD_FROM,
    }
    chosen = {
        "gathered_gradient": lambda *_: launch,
        "GATHERED_PARTS": share,
        "SUMMED_ROWS": rows,
        "GATHER_BACKWARD_FROM": 0,
    }
    try:
        for name, value in chosen.items():
            setattr(triton_config, name, value)
        yield
    finally:
        for name, value in held.items():
            setattr(triton_config, name, value)


@contextmanager
def only(kernel: str) -> Iterator[None]:
    """Of the gathering, only this kernel's launches are made."""
    run = gather_backward.run

    def some(found: Any, *args: Any, **kwargs: Any) -> None:
        if found.__name__ == kernel:
            run(found, *args, **kwargs)

    gather_backward.run = some
    try:
        yield
    finally:
        gather_backward.run = run


class Backward:
    """The backward of one selection, and parts of it."""

    def __init__(self, case: Case, v: Tensor, selection: Selection) -> None:
        self.q, self.k, self.v = case.q, case.k, v.contiguous()
        blocks = selection.blocks_BHQN.contiguous()
        self.selection = selection = replace(selection, blocks_BHQN=blocks)
        self.scale = case.q.shape[-1] ** -0.5
        self.out, self.lse, *_ = triton_launch.forward(
            self.q, self.k, self.v, selection, None, None, self.scale, False
        )
        self.dout = torch.randn_like(self.q)

    def __call__(self, selection: Selection | None = None) -> tuple[Tensor, ...]:
        given = self.selection if selection is None else selection
        return triton_launch.backward(
            self.q, self.k, self.v, self.out, self.lse, self.dout, None, given, None, None,
            self.scale, False,
        )[:3]  # fmt: skip

    def near(self) -> Any:
        blocks = self.selection.blocks_BHQN[..., :0]
        return self(replace(self.selection, blocks_BHQN=blocks))

    def lists(self) -> Any:
        q, k, blocks = self.q, self.k, self.selection.blocks_BHQN
        heads, kv_heads = q.shape[2], k.shape[2]
        launch = triton_config.gathered_gradient(heads // kv_heads, 64, 128, 2, q.device)
        size = gather_backward.chunk_of(q.shape[1], heads, kv_heads, q.shape[3], blocks.shape[3])
        return gather_backward.gather_lists(
            self.selection, size, max(1, launch.longest * kv_heads // heads)
        )

    def chosen(self) -> Callable[[], None]:
        """The gathering and its sums, lists included."""
        dq = torch.zeros_like(self.q)
        dk, dv = torch.zeros((2, *self.k.shape), device=dq.device).unbind()
        return lambda: gather_backward.add_chosen(
            self.q, self.k, self.v, self.dout, self.lse, self.lse, dq, dk, dv, self.selection,
            None, self.scale,
        )  # fmt: skip


def differences(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative errors."""
    return {
        name: float((a.float() - b.float()).norm() / b.float().norm())
        for name, a, b in zip(NAMES, got, want)
    }


def record(backward: Backward, device: torch.device, budget_s: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "whole_ms": milliseconds(backward, device, budget_s),
        "graph_ms": graph_milliseconds([backward], device, budget_s),
        "near_ms": milliseconds(backward.near, device, budget_s),
        "lists_ms": milliseconds(backward.lists, device, budget_s),
    }
    chosen = backward.chosen()
    for kernel in ("parts", "sum"):
        with only(f"{kernel}_kernel"):
            both = milliseconds(chosen, device, budget_s)
        row[f"{kernel}_ms"] = both - row["lists_ms"]
    row["host_ms"] = host_milliseconds(backward, device)
    row["extra_bytes"] = peak_bytes(backward, device)
    return row


def captured(path: Path, spec: SelectionSpec, device: torch.device) -> Selection:
    blocks = torch.from_numpy(np.load(path)["blocks"].astype(np.int32)).to(device)
    return Selection(spec, blocks[None, None], len(blocks), len(blocks))


def main() -> None:
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path)
    p.add_argument("--inputs", choices=("smooth", "random"), default="smooth")
    p.add_argument("--lists", type=Path, nargs="*", default=[], help="captured selections")
    p.add_argument("--seq-len", type=int, default=131072 if cuda else 200)
    p.add_argument("--heads", type=int, default=16 if cuda else 4)
    p.add_argument("--kv-heads", type=int, default=4 if cuda else 2)
    p.add_argument("--head-dim", type=int, default=128 if cuda else 32)
    p.add_argument("--k", type=int, default=2048 if cuda else 128)
    p.add_argument("--key-block", type=int, default=64 if cuda else 16)
    p.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    p.add_argument("--seconds", type=float, default=0.2 if cuda else 0.0, help="for each number")
    args = p.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    torch.manual_seed(0)
    window, sinks = (128, 64) if args.k > 512 else (32, 16)
    spec = SelectionSpec(args.key_block, 1, window, sinks)
    shape = Shape(
        "block", spec, args.seq_len, args.heads, args.kv_heads, args.head_dim, args.k, device,
        torch.bfloat16 if cuda else torch.float32, inputs=args.inputs, impl="triton",
    )  # fmt: skip
    report: dict[str, Any] = environment(device) | shape.fields()
    report["command"] = " ".join(["python", *sys.argv])
    report["records"] = []
    with torch.no_grad():
        case = make_case(shape)
        v = case.gated_values
        if args.lists:
            chosen = {x.name: captured(x, spec, device) for x in args.lists}
        else:
            chosen = {args.inputs: case.choose()}
        for source, selection in chosen.items():
            backward = Backward(case, v, selection)
            with variant(*VARIANTS[args.variants[0]]):
                triton_config.GATHER_BACKWARD_FROM = 1 << 62
                want = backward()
                unions = milliseconds(backward, device, args.seconds)
            print(f"{source}: union tiles {unions:.2f} ms", flush=True)
            for name in args.variants:
                launch, share, rows = VARIANTS[name]
                row: dict[str, Any] = {
                    "source": source, "name": name, "launch": asdict(launch), "share": share,
                    "sum_rows": rows, "union_tiles_ms": unions,
                }  # fmt: skip
                report["records"].append(row)
                try:
                    with variant(launch, share, rows):
                        row["difference"] = differences(backward(), want)
                        row |= record(backward, device, args.seconds)
                except (RuntimeError, TritonError) as error:  # the others may fit
                    row["error"] = str(error)
                    print(f"{name:32}{str(error).splitlines()[0]}", flush=True)
                else:
                    cells = "".join(
                        f"  {key.removesuffix('_ms')} {'-' if x is None else format(x, '.2f')}"
                        for key, x in row.items()
                        if key.endswith("_ms") and key != "union_tiles_ms"
                    )
                    errors = " ".join(f"{x:.1e}" for x in row["difference"].values())
                    print(f"{name:32}{cells}  {errors}", flush=True)
                if args.out:
                    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
