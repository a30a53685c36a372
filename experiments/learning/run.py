"""Does the indexer learn, and do adaptive budgets pay? Both as runs of the platform's own command.

    python experiments/learning/run.py indexers --seeds 0 1 --device cpu
    python experiments/learning/run.py budgets --device cuda --parallel 4 --model micro

Writes NAME.json (device, versions, commit, every command, every validation) and, from it, NAME.md
and NAME.png. `budgets` compares at equal mean keys: after a round, each adaptive arm's k is scaled
to the mean keys of `fixed` and run again. Anything after `--` is added to every command.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import report
from arms import BUDGETS, DEFAULT_INDEXERS, INDEXERS, budget_overrides
from jobs import Job, run_all

HERE = Path(__file__).parent
BLOCK, WINDOW, SINKS = 16, 64, 16  # C = R = 16 (conf/attention/gsa_16.yaml)


def main() -> int:
    typed, extra = sys.argv[1:], []
    if "--" in typed:
        at = typed.index("--")
        typed, extra = typed[:at], typed[at + 1 :]
    args = parser().parse_args(typed)
    known = INDEXERS if args.study == "indexers" else BUDGETS
    arms = args.arms or (DEFAULT_INDEXERS if args.study == "indexers" else list(BUDGETS))
    if unknown := [a for a in arms if a not in known]:
        raise SystemExit(f"unknown arms {', '.join(unknown)}; there are {', '.join(known)}")
    common = [*settings(args), *extra]
    made = sources(args)  # before the runs, which may outlast a commit
    if args.study == "indexers":
        jobs = [indexer_job(arm, seed, common, args.k) for seed in args.seeds for arm in arms]
        runs, matching = run(args, jobs), []
    else:
        runs, matching = matched(args, arms, common)
    path = args.out / f"{args.name or args.study}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    made |= {"device": device(args.device), "matching": matching, "runs": runs}
    path.write_text(json.dumps(made, indent=1) + "\n")
    print(report.write(path))
    print(f"written {path}, {path.with_suffix('.md')}, {path.with_suffix('.png')}")
    return 1 if any("error" in record for record in runs) else 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("study", choices=("indexers", "budgets"))
    p.add_argument("--arms", nargs="+", help="some of the arms only")
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--parallel", type=int, default=1, help="runs at a time")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--precision", default=None, help="default: bf16-mixed on cuda, else 32-true")
    p.add_argument("--model", default="nano")
    p.add_argument("--context", type=int, default=1024)
    p.add_argument("--batch", type=int, default=8, help="sequences per step")
    p.add_argument("--steps", type=int, default=500)
    p.add_argument("--points", type=int, default=10, help="validations during training")
    p.add_argument("--k", type=int, default=192, help="keys per query, window and sinks included")
    p.add_argument("--lr", type=float, default=6e-3)
    p.add_argument("--data", help="text files, a glob; default: the standard library's sources")
    p.add_argument("--tokenizer", help="a tokenizers JSON file; default: bytes")
    p.add_argument("--rounds", type=int, default=2, help="budgets: re-runs to match mean keys")
    p.add_argument("--tolerance", type=float, default=0.03, help="of the mean keys")
    p.add_argument("--runs", type=Path, default=Path("runs/learning"), help="run folders go here")
    p.add_argument("--resume", action="store_true", help="keep finished runs of equal command")
    p.add_argument("--out", type=Path, default=HERE, help="results go here")
    p.add_argument("--commit", help="to record, where the sources are no git checkout")
    p.add_argument("--name", help="of the result files; default: the study")
    return p


def settings(args: argparse.Namespace) -> list[str]:
    """Overrides that every arm shares."""
    precision = args.precision or ("bf16-mixed" if args.device == "cuda" else "32-true")
    overrides = [
        "experiment=gsa_128k",
        "picked.hardware=none",
        f"model={args.model}",
        f"context={args.context}",
        "attention=gsa_16",
        f"sparsity.window={WINDOW}",
        f"sparsity.sinks={SINKS}",
        f"train.batch_size={args.batch}",
        f"train.steps={args.steps}",
        f"train.val_every={max(1, args.steps // args.points)}",
        "train.val_batches=4",
        "train.dense_cost=false",
        f"train.log_every={max(1, args.steps // 50)}",
        f"optim.lr={args.lr:g}",
        f"optim.warmup_steps={args.steps // 25}",
        "trainer.progress_bar=false",
        f"trainer.accelerator={args.device}",
        f"trainer.precision={precision}",
        "tracking=none",
    ]
    if args.data:
        overrides += ["data=text", f"data.paths=['{args.data}']"]
    if args.tokenizer:
        overrides.append(f"data.tokenizer={args.tokenizer}")
    return overrides


def indexer_job(arm: str, seed: int, common: list[str], k: int) -> Job:
    chosen = [*common, f"sparsity.k={k}", *INDEXERS[arm]]
    if arm == "hierarchical_kl":  # twice as many keys survive as are chosen
        chosen.append(f"indexer.survivors={max(8, 2 * k // 64)}")
    if arm == "dense":  # it chooses nothing
        chosen = [x for x in chosen if not x.startswith(("sparsity", "attention=gsa"))]
    return Job(arm, seed, f"{arm}_{seed}", chosen)


def run(args: argparse.Namespace, jobs: list[Job]) -> list[dict[str, Any]]:
    return run_all(jobs, args.runs, args.parallel, args.device, args.resume)


def matched(
    args: argparse.Namespace, arms: list[str], common: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(last runs of every arm, the k and mean keys of every round): arms at equal mean keys."""
    arms = ["fixed", *(a for a in arms if a != "fixed")]
    k = dict.fromkeys(arms, args.k)
    latest: dict[str, list[dict[str, Any]]] = {}
    rounds: list[dict[str, Any]] = []
    seen: dict[str, dict[int, float]] = {arm: {} for arm in arms}  # k -> mean keys
    todo = arms
    for number in range(args.rounds + 1):
        jobs = [
            Job(arm, seed, f"{arm}_{seed}_round{number}", [*common, *overrides(arm, k[arm])])
            for seed in args.seeds
            for arm in todo
        ]
        for job, record in zip(jobs, run(args, jobs)):
            if job.seed == args.seeds[0]:
                latest[job.arm] = []
            latest[job.arm].append(record)
        means = {arm: keys(latest[arm]) for arm in arms}
        rounds.append({"k": dict(k), "keys_mean": means})
        target = means["fixed"]
        if not target:
            break
        off = {a: m for a, m in means.items() if m and abs(m / target - 1) > args.tolerance}
        todo = [arm for arm in arms if arm in off]
        if not todo:
            break
        for arm in todo:
            seen[arm][k[arm]] = off[arm]
            k[arm] = next_k(seen[arm], k[arm], target)
    return [record for arm in arms for record in latest[arm]], rounds


def overrides(arm: str, k: int) -> list[str]:
    return budget_overrides(arm, k, BLOCK, WINDOW + SINKS)


def keys(runs: list[dict[str, Any]]) -> float | None:
    """Mean keys per query at the end, over the seeds that finished."""
    found = [r["history"][-1]["keys_mean"] for r in runs if "history" in r]
    return sum(found) / len(found) if found else None


def next_k(seen: dict[int, float], k: int, target: float) -> int:
    """The k, in whole blocks, to try next: between those that gave too few and too many mean
    keys, or, while there is only one side, scaled as the chosen keys must be."""
    forced = WINDOW + SINKS
    low = max((x for x in seen if seen[x] <= target), default=None)
    high = min((x for x in seen if seen[x] > target), default=None)
    if low is not None and high is not None and low < high:
        found = low + (high - low) * (target - seen[low]) / (seen[high] - seen[low])
    else:
        found = forced + (k - forced) * max(target - forced, 1) / max(seen[k] - forced, 1)
    return forced + max(1, round((found - forced) / BLOCK)) * BLOCK


def sources(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers are made with."""
    from gsa_platform.tracking.environment import git_state, versions

    state = git_state()
    return {
        "study": args.study,
        "command": shlex.join(["python", "experiments/learning/run.py", *recorded()]),
        "versions": versions(),
        "commit": args.commit or (state.commit if state else None),
        "dirty": bool(not args.commit and state and state.dirty),
    }


def recorded() -> list[str]:
    """The arguments that say what was run: without the folders of one machine."""
    words = iter(sys.argv[1:])
    kept = []
    for word in words:
        if word in ("--out", "--runs", "--commit", "--name"):
            next(words, None)
        else:
            kept.append(word)
    return kept


def device(kind: str) -> str:
    import torch

    from gsa_platform.diagnostics.device import device_name

    return device_name(torch.device(kind))


if __name__ == "__main__":
    sys.exit(main())
