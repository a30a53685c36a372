"""Dense, sparse only, gated only and GSA side by side, in one MLflow experiment; writes the table.

    python experiments/spine/run.py [overrides ...]

Each arm is one command of the platform (see ARMS); overrides are added to all of them. Results go
to runs/ in the current folder, the table to arms.json and table.md beside this file.
"""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
COMMON = [
    "experiment=gsa_128k",
    "context=2048",
    "tracking.experiment=spine",
    "tracking.system_metrics=false",
    "picked.hardware=none",
    "train.batch_size=4",
    "train.steps=120",
    "train.val_batches=4",
    "train.dense_cost=false",
    "optim.lr=6e-3",
    "optim.warmup_steps=10",
]
SPARSE = ["sparsity.k=256", "sparsity.sinks=64"]
ARMS = {
    "dense": ["attention=dense", "gate=none"],
    "sparse_only": ["attention=gsa", "gate=none", *SPARSE],
    "gated_only": ["attention=dense", "gate=dual"],
    "gsa": ["attention=gsa", "gate=dual", *SPARSE],
    "gsa_frozen_indexer": ["attention=gsa", "gate=dual", "objective=none", *SPARSE],
}
COLUMNS = {
    "val_loss": ("validation loss, nats/byte", "{:.4f}"),
    "keys_mean": ("keys per query", "{:.0f}"),
    "recall_first": ("recall, before", "{:.1%}"),
    "recall_last": ("recall, after", "{:.1%}"),
    "recall_best": ("best possible", "{:.1%}"),
    "first_token": ("first token", "{:.2%}"),
    "gate_value_mean": ("value gate", "{:.3f}"),
    "gate_output_mean": ("output gate", "{:.3f}"),
    "tokens_per_s": ("tokens/s", "{:,.0f}"),
    "peak_memory_gb": ("peak GB", "{:.2f}"),
}


def run(name: str, overrides: list[str]) -> dict[str, object]:
    """Train one arm; returns the figures of its closing summary and its command."""
    arguments = [*COMMON, f"name={name}", f"tracking.run_name={name}", *overrides, *sys.argv[1:]]
    subprocess.run([sys.executable, "-m", "gsa_platform", *arguments], check=True)
    folder = max((Path("runs") / name).iterdir(), key=lambda p: p.stat().st_mtime)
    summary = json.loads((folder / "result.json").read_text())["summary"]
    shares = summary.pop("first_token_attention") or []
    summary["first_token"] = sum(shares) / len(shares) if shares else None
    for key in ("run_dir", "mlflow_command"):
        summary.pop(key, None)
    return {"command": "python -m gsa_platform " + " ".join(arguments), "summary": summary}


def table(arms: dict[str, dict]) -> str:  # type: ignore[type-arg]
    rows = ["| arm | " + " | ".join(title for title, _ in COLUMNS.values()) + " |"]
    rows.append("|---" * (len(COLUMNS) + 1) + "|")
    for name, arm in arms.items():
        cells = []
        for key, (_, form) in COLUMNS.items():
            value = arm["summary"].get(key)
            cells.append("-" if value is None else form.format(value))
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def main() -> None:
    arms = {name: run(name, overrides) for name, overrides in ARMS.items()}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE)
    report = {"commit": commit.stdout.strip(), "arms": arms}
    (HERE / "arms.json").write_text(json.dumps(report, indent=1) + "\n")
    (HERE / "table.md").write_text(table(arms))
    print(table(arms))


if __name__ == "__main__":
    main()
