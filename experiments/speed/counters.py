"""Hardware counters (ncu) of every kernel of block and token mode's attention: what limits each.

    python experiments/speed/counters.py --lists layer.npz --unions 4 --out counters.json

`block` on the lists of a trained model (lists.py), or on smooth queries without, by query
gathering and by union tiles; `token` on random unions `--unions` times as large as a query's own
keys (see token_attention.py). `--passes backward` also counts the backward. ncu replays every
kernel some times; clocks are left alone. Shares are of what the GPU sustains at most, means over a
kernel's time. `--dry` runs each once without ncu, small where there is no GPU.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gsa_kernels.bench.case import Shape, make_case
from gsa_kernels.bench.timing import environment
from gsa_kernels.selection import SelectionSpec
from gsa_kernels.sparse_attention import sparse_attention, triton_config

DESIGNS = ("gathering", "unions", "token")
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis")
# Sums over the launches of a kernel: field, counter, unit.
SUMS = (
    ("ms", "gpu__time_duration.sum", 1e-6),
    ("dram_read_gb", "dram__bytes_read.sum", 1e-9),
    ("dram_written_gb", "dram__bytes_write.sum", 1e-9),
    ("l2_gb", "lts__t_bytes.sum", 1e-9),
)
# Shares in percent, weighted by time: field, counters, of which the largest counts.
SHARES = (
    ("dram", r"dram__throughput\.avg\.pct_of_peak_sustained_elapsed"),
    ("l2", r"lts__throughput\.avg\.pct_of_peak_sustained_elapsed"),
    ("l1", r"l1tex__throughput\.avg\.pct_of_peak_sustained_(active|elapsed)"),
    ("sm", r"sm__throughput\.avg\.pct_of_peak_sustained_elapsed"),
    ("tensor", r"sm__\w*pipe_tensor\w*\.avg\.pct_of_peak_sustained_\w+"),
    ("issue", r"sm__inst_issued\.avg\.pct_of_peak_sustained_\w+"),
)


def attention(args: argparse.Namespace, design: str) -> Callable[[bool], Any]:
    """call(backward) for one design, at its sizes."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.manual_seed(0)
    mode, c = ("token", 1) if design == "token" else ("block", 64 if cuda else 16)
    window, sinks = (128, 64) if cuda else (32, 16)
    sizes = (16, 4, 128) if cuda else (4, 2, 32)
    shape = Shape(
        mode, SelectionSpec(c, 1, window, sinks), args.seq_len, *sizes,
        2048 if cuda else 128, device, torch.bfloat16 if cuda else torch.float32,
        inputs="smooth", impl="triton",
    )  # fmt: skip
    given = None
    if design == "token":
        from token_attention import drawn

        given = drawn(args.seq_len, shape.k, args.unions, device)
        shape = replace(shape, spec=given.spec)
    elif args.lists:
        from query_gathering import selection_of

        given = selection_of(args.lists, shape.spec, device)
        shape = replace(shape, seq_len=given.n_queries)
    triton_config.GATHER_FROM = triton_config.GATHER_BACKWARD_FROM = (
        0 if design == "gathering" else 1 << 62
    )
    case = make_case(shape)
    with torch.no_grad():
        selection = case.choose() if given is None else given
        v = case.gated_values.detach()

    def call(backward: bool) -> Any:
        leaves = [x.detach().requires_grad_(backward) for x in (case.q, case.k, v)]
        out = sparse_attention(*leaves, selection, impl="triton").out_BTHE
        return torch.autograd.grad(out.sum(), leaves) if backward else out

    return call


def run_inside(args: argparse.Namespace) -> None:
    """What runs under ncu: one call, after another that compiles."""
    design, backward = args.inside[0], args.inside[1] == "backward"
    call = attention(args, design)
    call(backward)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()  # type: ignore[attr-defined]
    call(backward)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()  # type: ignore[attr-defined]


def kernels_of(output: str) -> list[dict[str, Any]]:
    """A record per kernel of ncu's raw page as CSV, in base units; the longest first."""
    lines = output.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        raise SystemExit("ncu gave no table:\n" + "\n".join(lines[-20:]))
    head, _units, *rows = csv.reader(io.StringIO("\n".join(lines[first:])))
    found: dict[str, dict[str, Any]] = {}
    for values in rows:
        row = dict(zip(head, values))
        name = re.sub(r"[<(].*", "", row["Kernel Name"])
        held = found.setdefault(name, {"kernel": name, "launches": 0})
        held["launches"] += 1
        for field, counter, unit in SUMS:
            if number(row.get(counter)) is not None:
                held[field] = held.get(field, 0.0) + number(row[counter]) * unit
        time = number(row["gpu__time_duration.sum"])
        for field, pattern in SHARES:
            seen = [number(x) for key, x in row.items() if re.fullmatch(pattern, key)]
            best = max((x for x in seen if x is not None), default=None)
            if best is not None:
                held[field] = held.get(field, 0.0) + best * time / 100
    for held in found.values():
        for field, _ in SHARES:
            if field in held:
                held[field] *= 1e-6 / held["ms"]  # a mean over its time
    return sorted(found.values(), key=lambda x: -x["ms"])


def number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def counted(args: argparse.Namespace, design: str, what: str) -> list[dict[str, Any]]:
    program = shutil.which("ncu", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin")
    if program is None:
        raise SystemExit("ncu is not on the PATH: it comes with the CUDA toolkit")
    command = [program, "--csv", "--page", "raw", "--print-units", "base"]
    command += ["--profile-from-start", "off", "--clock-control", "none"]
    for section in SECTIONS:
        command += ["--section", section]
    command += ["--metrics", ",".join(counter for _, counter, _ in SUMS)]
    command += [sys.executable, __file__, "--inside", design, what]
    command += ["--seq-len", str(args.seq_len), "--unions", str(args.unions)]
    command += ["--lists", str(args.lists)] if args.lists else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"ncu failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return kernels_of(done.stdout)


def main() -> None:
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, default=Path("counters.json"))
    p.add_argument("--designs", nargs="+", choices=DESIGNS, default=list(DESIGNS))
    p.add_argument("--passes", nargs="+", choices=("forward", "backward"), default=["forward"])
    p.add_argument("--seq-len", type=int, default=131072 if cuda else 128)
    p.add_argument("--lists", type=Path)
    p.add_argument("--unions", type=float, default=4)
    p.add_argument("--dry", action="store_true")
    p.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.inside:
        run_inside(args)
        return
    if args.dry:
        for design in args.designs:
            for what in args.passes:
                attention(args, design)(what == "backward")
        return
    report: dict[str, Any] = dict(environment(torch.device("cuda" if cuda else "cpu")))
    report["command"], report["records"] = " ".join(["python", *sys.argv]), []
    for design in args.designs:
        for what in args.passes:
            for row in counted(args, design, what):
                report["records"].append({"design": design, "pass": what, **row})
                cells = (f"{k} {x:.3g}" for k, x in row.items() if isinstance(x, float))
                print(f"{design} {what} {row['kernel']} x {row['launches']}:", *cells, flush=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
