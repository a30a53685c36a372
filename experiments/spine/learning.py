"""Does the indexer learn on text? Recall with the KL objective and with a frozen indexer.

    python experiments/spine/learning.py [seed ...]

Each run is one command of the platform; both arms of a seed see the same batches. Writes
learning.json beside this file: recall (share of the dense attention mass on the candidates that
the selection covers), the best that as many blocks could cover, and the validation loss, before
and after. Runs go to runs/ in the current folder.
"""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SETTINGS = [
    "experiment=gsa_128k",
    "picked.hardware=none",
    "context=1024",
    "attention=gsa_16",
    "sparsity.k=192",
    "sparsity.window=64",
    "sparsity.sinks=16",
    "train.batch_size=8",
    "train.steps=500",
    "train.val_batches=4",
    "train.dense_cost=false",
    "optim.lr=6e-3",
    "optim.warmup_steps=20",
    "tracking=none",
]
KEPT = ("val/loss", "val/recall", "val/recall_best", "val/recall_overlap", "val/mass_covered")


def run(objective: str, seed: int) -> dict[str, object]:
    """Train one arm; returns its command and the validations before and after."""
    name = f"learning_{objective}_{seed}"
    arguments = [*SETTINGS, f"objective={objective}", f"seed={seed}", f"name={name}"]
    subprocess.run([sys.executable, "-m", "gsa_platform", *arguments], check=True)
    folder = max((Path("runs") / name).iterdir(), key=lambda p: p.stat().st_mtime)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: row[key] for key in KEPT} for row in rows if "val/recall" in row]
    return {
        "objective": objective,
        "seed": seed,
        "command": "python -m gsa_platform " + " ".join(arguments),
        "before": rows[0],
        "after": rows[-1],
    }


def main() -> None:
    seeds = [int(x) for x in sys.argv[1:]] or [0]
    runs = [run(objective, seed) for seed in seeds for objective in ("kl", "none")]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE)
    report = {"commit": commit.stdout.strip(), "runs": runs}
    (HERE / "learning.json").write_text(json.dumps(report, indent=1) + "\n")
    for r in runs:
        before, after = r["before"], r["after"]
        print(
            f"seed {r['seed']} objective {r['objective']:<5} recall {before['val/recall']:.1%} -> "
            f"{after['val/recall']:.1%}, best {after['val/recall_best']:.1%}, "
            f"loss {after['val/loss']:.4f}"
        )


if __name__ == "__main__":
    main()
