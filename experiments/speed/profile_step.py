"""Time of every kernel in one step of a layer: choice, attention, gates, KL, and their backward.

    python experiments/speed/profile_step.py --mode token --out profile.json

Smooth queries, H = 16, K = 4, E = 128, k = 2048; torch.profiler's times of the second step.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from first_call import step
from torch.profiler import ProfilerActivity, profile

from gsa_kernels.bench.timing import environment


def main() -> None:
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--mode", choices=("tile", "block", "token"), default="token")
    p.add_argument("--seq-len", type=int, default=131072 if cuda else 256)
    p.add_argument("--out", type=Path)
    args = p.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    run = step(args.mode, args.seq_len)
    run()  # compiles
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        run()
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = [
        {"kernel": e.key, "launches": e.count, "ms": getattr(e, field) / 1e3}
        for e in found.key_averages()
    ]
    rows.sort(key=lambda row: -row["ms"])
    report: dict[str, Any] = environment(device) | {"mode": args.mode, "seq_len": args.seq_len}
    report |= {"command": " ".join(["python", *sys.argv]), "records": rows}
    print(f"{sum(row['ms'] for row in rows):9.2f} ms in all")
    for row in rows[:25]:
        print(f"{row['ms']:9.2f} ms  {row['launches']:5} x  {row['kernel'][:70]}")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
