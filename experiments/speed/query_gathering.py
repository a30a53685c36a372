"""Union tiles and query gathering, the two forwards of queries that choose for themselves (R = 1).

    python experiments/speed/query_gathering.py --seq-len 131072 --out query_gathering.json
    python experiments/speed/query_gathering.py --lists layer.npz --united 6 8 --chunk 4096 16384

Times are of the forward alone, the selection is given. Each setting of gathering is checked
against the union tiles. Lists of a trained model: an .npz whose `blocks` [T, N] int16 are the
choices of one sequence, ascending, padded with -1; the other inputs are random then too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime.errors import TritonError

from gsa_kernels.bench.case import Shape, make_case
from gsa_kernels.bench.timing import environment, host_milliseconds, milliseconds, peak_bytes
from gsa_kernels.selection import Selection, SelectionSpec
from gsa_kernels.sparse_attention import gather_launch, sparse_attention
from gsa_kernels.sparse_attention import triton_config as config

Attend = Callable[..., tuple[Tensor, ...]]


@contextmanager
def constants(**values: int) -> Iterator[None]:
    """Constants GATHER_* of the configuration for a while."""
    before = {name: getattr(config, f"GATHER_{name.upper()}") for name in values}
    for name, value in values.items():
        setattr(config, f"GATHER_{name.upper()}", value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, f"GATHER_{name.upper()}", value)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def record(
    attend: Attend, want: tuple[Tensor, ...] | None, device: torch.device, seconds: float
) -> dict[str, Any]:
    """Differences from `want`, and times: without the mass, with it, and of the host."""
    row: dict[str, Any] = {}
    if want is not None:
        found = zip(("out", "lse", "mass"), attend(need_mass=True), want)
        row["difference"] = {name: error(got, other) for name, got, other in found}
    row["ms"] = milliseconds(attend, device, seconds)
    row["with_mass_ms"] = milliseconds(partial(attend, need_mass=True), device, seconds)
    row["host_ms"] = host_milliseconds(attend, device)
    row["extra_bytes"] = peak_bytes(attend, device)
    return row


def selection_of(file: Path, spec: SelectionSpec, device: torch.device) -> Selection:
    blocks = torch.from_numpy(np.load(file)["blocks"].astype(np.int32)).to(device)
    last, c = int(blocks.max()), spec.key_block
    if (last + 1) * c > len(blocks):  # kernels trust their lists
        raise SystemExit(
            f"{file}: block {last} of {c} keys, in a text of {len(blocks)} positions: give the "
            "--key-block that the lists were made with"
        )
    return Selection(spec, blocks[None, None].contiguous(), len(blocks), len(blocks))


def main() -> None:
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path)
    p.add_argument("--seq-len", type=int, default=131072 if cuda else 256)
    p.add_argument("--inputs", choices=("smooth", "random"), default="smooth")
    p.add_argument("--lists", type=Path, help="choices of a trained model, whose length they have")
    p.add_argument("--heads", type=int, default=16 if cuda else 4)
    p.add_argument("--kv-heads", type=int, default=4 if cuda else 2)
    p.add_argument("--head-dim", type=int, default=128 if cuda else 32)
    p.add_argument("--k", type=int, default=2048 if cuda else 128)
    p.add_argument("--key-block", type=int, default=64 if cuda else 16)
    p.add_argument("--united", type=int, nargs="+", default=[6, 8, 11, 17])
    p.add_argument("--chunk", type=int, nargs="+", default=[4096, 8192, 16384])
    p.add_argument("--longest", type=int, nargs="+", default=[config.GATHER_LONGEST])
    p.add_argument("--bytes", type=int, nargs="+", default=[config.GATHER_BYTES])
    p.add_argument("--pairs", type=int, nargs="+", choices=(0, 1), default=[0, 1])
    p.add_argument("--seconds", type=float, default=0.15 if cuda else 0.0, help="for each number")
    args = p.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    torch.manual_seed(0)
    window, sinks = (128, 64) if args.k > 512 else (32, 16)
    shape = Shape(
        "block", SelectionSpec(args.key_block, 1, window, sinks), args.seq_len, args.heads,
        args.kv_heads, args.head_dim, args.k, device, torch.bfloat16 if cuda else torch.float32,
        inputs=args.inputs, impl="triton",
    )  # fmt: skip
    given = None
    if args.lists:
        given = selection_of(args.lists, shape.spec, device)
        shape = replace(shape, seq_len=given.n_queries, inputs="random")
    report: dict[str, Any] = environment(device) | shape.fields()
    report["command"], report["records"] = " ".join(["python", *sys.argv]), []
    case = make_case(shape)
    selection, v = given or case.choose(), case.gated_values

    @torch.no_grad()
    def attend(need_mass: bool = False) -> tuple[Tensor, ...]:
        found = sparse_attention(
            case.q, case.k, v, selection, need_lse=True, need_mass=need_mass, impl="triton"
        )
        assert found.lse_BTH is not None
        mass = found.mass_BHQN
        return found.out_BTHE, found.lse_BTH, *([] if mass is None else [mass])

    def keep(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        report["records"].append(row)
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n")

    unions = {"from": shape.seq_len + 1}
    with constants(**unions):
        want = attend(need_mass=True)
        keep({"design": "union tiles"} | record(attend, None, device, args.seconds))
    for values in product(args.united, args.chunk, args.longest, args.bytes, args.pairs):
        sizes = dict(zip(("united", "chunk", "longest", "bytes", "pairs"), values))
        row: dict[str, Any] = {"design": "gathering"} | sizes
        with constants(**{"from": 0}, **sizes):
            try:
                row |= record(attend, want, device, args.seconds)
                split = partial(
                    gather_launch.split_choices, case.q, case.k, selection, None, False
                )
                found = split()
                assert found is not None
                row["split_ms"] = milliseconds(split, device, args.seconds)
                row["far_choices"] = float(found.counts_3BHT[1].float().mean())
                row["pairs_of_a_query"] = float(found.counts_3BHT[2].float().mean())
            except (RuntimeError, TritonError) as problem:  # the others may fit
                row["error"] = str(problem)
        keep(row)
    with constants(**unions):
        keep({"design": "union tiles", "ms": milliseconds(attend, device, args.seconds)})


if __name__ == "__main__":
    main()
