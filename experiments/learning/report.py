"""The table and the figure of a study, made from its JSON file and nothing else.

python experiments/learning/report.py experiments/learning/indexers.json
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

# title, value of (first, last) validation, how it is printed
COLUMNS = [
    ("keys per query", lambda a, b: b.get("keys_mean"), "{:.0f}"),
    ("recall, before", lambda a, b: a.get("recall"), "{:.1%}"),
    ("recall, after", lambda a, b: b.get("recall"), "{:.1%}"),
    ("best possible, after", lambda a, b: b.get("recall_best"), "{:.1%}"),
    ("share of the best", lambda a, b: _share(b), "{:.1%}"),
    ("top-k overlap", lambda a, b: b.get("recall_overlap"), "{:.1%}"),
    ("mass covered", lambda a, b: b.get("mass_covered"), "{:.1%}"),
    ("validation loss", lambda a, b: b["loss"], "{:.4f}"),
]


def _share(last: dict[str, float]) -> float | None:
    return last["recall"] / last["recall_best"] if last.get("recall_best") else None


def by_arm(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Finished runs of each arm, in the order of the file."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for run in report["runs"]:
        if "history" in run:
            arms.setdefault(run["arm"], []).append(run)
    return arms


def table(report: dict[str, Any]) -> str:
    """Markdown: a row per arm, mean over seeds and, with several, the standard deviation."""
    rows = ["| arm | seeds | " + " | ".join(title for title, _, _ in COLUMNS) + " |"]
    rows.append("|---" * (len(COLUMNS) + 2) + "|")
    for arm, runs in by_arm(report).items():
        cells = []
        for _, value, form in COLUMNS:
            found = [value(r["history"][0], r["history"][-1]) for r in runs]
            numbers = [x for x in found if x is not None]
            cells.append(_cell(numbers, form))
        rows.append(f"| {arm} | {len(runs)} | " + " | ".join(cells) + " |")
    lines = ["\n".join(rows), "", _setting(report)]
    failed = [f"{r['arm']} (seed {r['seed']})" for r in report["runs"] if "error" in r]
    if failed:
        lines += ["", "Failed: " + ", ".join(failed) + "."]
    return "\n".join(lines) + "\n"


def _cell(numbers: list[float], form: str) -> str:
    if not numbers:
        return "-"
    text = form.format(statistics.mean(numbers))
    if len(numbers) > 1:
        text += " ± " + form.format(statistics.stdev(numbers)).replace("%", "")
    return text


def _setting(report: dict[str, Any]) -> str:
    packages = report["versions"]["packages"]
    made = f"torch {packages.get('torch')}, commit {(report['commit'] or 'unknown')[:12]}"
    if report["dirty"]:
        made += " with uncommitted changes"
    steps = report["runs"][0]["history"][-1]["step"] if by_arm(report) else 0
    return f"{report['device']}, {made}; {steps} steps; `{report['command']}`."


def plot(report: dict[str, Any], path: Path) -> None:
    """Recall over training steps, mean over seeds with their range, and the last losses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms = by_arm(report)
    if not arms:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.5))
    colours = dict(zip(arms, plt.get_cmap("tab20").colors))
    best: dict[int, list[float]] = {}
    for arm, runs in arms.items():
        points: dict[int, list[float]] = {}
        for row in (row for run in runs for row in run["history"] if "recall" in row):
            points.setdefault(row["step"], []).append(row["recall"])
            best.setdefault(row["step"], []).append(row["recall_best"])
        steps = sorted(points)
        means = [statistics.mean(points[s]) for s in steps]
        low, high = ([f(points[s]) for s in steps] for f in (min, max))
        if steps:
            left.plot(steps, means, label=arm, color=colours[arm], marker=".")
            left.fill_between(steps, low, high, color=colours[arm], alpha=0.15)
    mean = [statistics.mean(best[s]) for s in sorted(best)]
    left.plot(sorted(best), mean, "k:", label="best possible (mean of the arms)")
    left.set(xlabel="training steps", ylabel="recall of dense attention mass on candidates")
    left.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=5)
    equal = report["study"] == "indexers"  # equal keys: the arms themselves are the axis
    for i, (arm, runs) in enumerate(arms.items()):
        last = [run["history"][-1] for run in runs]
        x = [i if equal else row.get("keys_mean", float("nan")) for row in last]
        right.scatter(x, [row["loss"] for row in last], label=arm, color=colours[arm])
    if equal:
        right.set_xticks(range(len(arms)), arms, rotation=45, ha="right")
    else:
        right.set(xlabel="keys attended per query")
        right.legend(fontsize=8)
    right.set(ylabel="validation loss, nats per token (one point per seed)")
    figure.suptitle(f"{report['study']}: {report['device']}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(path: Path) -> str:
    """Write NAME.md and NAME.png beside NAME.json; returns the table."""
    report = json.loads(path.read_text())
    text = table(report)
    path.with_suffix(".md").write_text(text)
    plot(report, path.with_suffix(".png"))
    return text


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(write(Path(name)))
