"""Runs of the platform in processes of their own, several at a time, read from their folders."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEPT = (
    "val/loss",
    "val/recall",
    "val/recall_best",
    "val/recall_overlap",
    "val/mass_covered",
    "val/keys_mean",
    "val/keys_min",
    "val/keys_max",
)


@dataclass(frozen=True)
class Job:
    """One training run. name: its folder below the output root, unique within a study."""

    arm: str
    seed: int
    name: str
    overrides: list[str]

    def command(self) -> list[str]:
        return ["-m", "gsa_platform", *self.overrides, f"seed={self.seed}", f"name={self.name}"]

    def text(self) -> str:
        return "python " + shlex.join(self.command())


def run_all(
    jobs: list[Job], root: Path, parallel: int, device: str, resume: bool = False
) -> list[dict[str, Any]]:
    """The record of each job, in order. A job that fails has an `error` and no history.

    Records are also kept as root/NAME.json; resume takes those of the same command from there.
    """
    cores = max(1, (os.cpu_count() or 1) // parallel)
    # Each process would otherwise take every core, and they would wait for one another.
    environ = os.environ | ({"OMP_NUM_THREADS": str(cores)} if device == "cpu" else {})
    root.mkdir(parents=True, exist_ok=True)
    done = 0

    def one(job: Job) -> dict[str, Any]:
        nonlocal done
        kept = root / f"{job.name}.json"
        record = json.loads(kept.read_text()) if resume and kept.exists() else {}
        if "history" not in record or record["command"] != job.text():
            record = _run(job, root, environ)
            kept.write_text(json.dumps(record, indent=1) + "\n")
        done += 1
        print(f"[{done}/{len(jobs)}] {describe(record)}", flush=True)
        return record

    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(one, jobs))


def _run(job: Job, root: Path, environ: dict[str, str]) -> dict[str, Any]:
    log = root / f"{job.name}.log"
    command = [*job.command(), f"output_root={root}"]
    began = time.time()
    with open(log, "w") as handle:
        code = subprocess.run(
            [sys.executable, *command], stdout=handle, stderr=subprocess.STDOUT, env=environ
        ).returncode
    record: dict[str, Any] = {
        "arm": job.arm,
        "seed": job.seed,
        "command": job.text(),
        "seconds": round(time.time() - began, 1),
    }
    if code:
        tail = log.read_text().strip().splitlines()[-3:]
        return record | {"error": f"exit code {code}: " + " | ".join(tail)}
    folder = max((p for p in (root / job.name).iterdir() if p.is_dir()), key=_modified)
    return record | {"history": history(folder / "metrics.jsonl")}


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def history(path: Path) -> list[dict[str, float]]:
    """Every validation of a run, {step, loss, recall, ...}; the last one of a step counts."""
    found: dict[int, dict[str, float]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if "val/loss" in row:
            found[int(row["step"])] = {k.partition("/")[2]: row[k] for k in KEPT if k in row}
    return [{"step": step, **values} for step, values in sorted(found.items())]


def describe(record: dict[str, Any]) -> str:
    title = f"{record['arm']}, seed {record['seed']}, {record['seconds']:.0f} s"
    if "error" in record:
        return f"{title}: FAILED, {record['error']}"
    first, last = record["history"][0], record["history"][-1]
    text = f"{title}: loss {last['loss']:.4f}"
    if "recall" in last:
        text += f", recall {first['recall']:.1%} -> {last['recall']:.1%}"
        text += f" of {last['recall_best']:.1%}, keys {last['keys_mean']:.0f}"
    return text
