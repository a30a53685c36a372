"""Seconds that the first forward and backward of a process take, with no compiled kernel kept.

    python experiments/speed/first_call.py --out first_call.json

The whole path of a layer in each mode (scoring, selection, attention, gates, KL), at a shape whose
tile sizes are in the table of triton_config.py: nothing is tuned, so this is what Triton compiles.
A second process finds the kernels in Triton's cache, of which each mode has its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gsa_kernels.bench.case import Shape, make_case
from gsa_kernels.bench.timing import environment
from gsa_kernels.selection import SelectionSpec

MODES = {"tile": (64, 64), "block": (64, 1), "token": (1, 1)}  # C, R


def step(mode: str, tokens: int) -> Callable[[], None]:
    """One training step of a layer, its end awaited."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    (c, r), sizes = MODES[mode], (16, 4, 128) if cuda else (2, 1, 32)
    window, sinks, k = (128, 64, 2048) if cuda else (32, 16, 128)
    shape = Shape(
        mode, SelectionSpec(c, r, window, sinks), tokens, *sizes, k, device,
        torch.bfloat16 if cuda else torch.float32, inputs="smooth",
    )  # fmt: skip
    case = make_case(shape).learn()
    dout = torch.randn_like(case.q)

    def run() -> None:
        case.train(dout)
        if cuda:
            torch.cuda.synchronize()

    return run


def first(mode: str, tokens: int) -> float:
    """Seconds of a step, in a process that has made none."""
    run = step(mode, tokens)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seq-len", type=int, default=131072 if torch.cuda.is_available() else 256)
    p.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    p.add_argument("--out", type=Path, default=Path("first_call.json"))
    p.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.inside:
        print(first(args.modes[0], args.seq_len))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report: dict[str, Any] = dict(environment(device))
    report["command"], report["records"] = " ".join(["python", *sys.argv]), []
    for mode in args.modes:
        row: dict[str, Any] = {"mode": mode, "seq_len": args.seq_len}
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, __file__, "--inside", "--modes", mode]
            command += ["--seq-len", str(args.seq_len)]
            for name in ("first_s", "cached_s"):
                done = subprocess.run(
                    command, env=os.environ | {"TRITON_CACHE_DIR": cache}, check=True, text=True,
                    stdout=subprocess.PIPE,
                )  # fmt: skip
                row[name] = float(done.stdout.split()[-1])
        report["records"].append(row)
        print(
            f"{mode}: {row['first_s']:.1f} s, from the cache {row['cached_s']:.1f} s", flush=True
        )
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
