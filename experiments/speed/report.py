"""Table and plot of a speed run: reads h200.json or the file named; table.md and speed.png.

python -m gsa_kernels.bench.attention --out experiments/speed/h200.json ...
python experiments/speed/report.py [file.json]
"""

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COLUMNS = {
    "seq_len": ("tokens", "{:,}"),
    "kv_heads": ("K", "{}"),
    "C": ("C", "{}"),
    "R": ("R", "{}"),
    "pass": ("pass", "{}"),
    "dense_ms": ("dense, ms", "{:.2f}"),
    "ours_ms": ("whole path, ms", "{:.2f}"),
    "ratio": ("ratio", "{:.1f}x"),
    "select_ms": ("scoring and selection, ms", "{:.2f}"),
    "attend_ms": ("attention, ms", "{:.2f}"),
    "attend_ratio": ("attention alone", "{:.1f}x"),
    "roofline": ("of the bound", "{:.0%}"),
    "peak_extra_bytes": ("extra memory, MB", "{:.0f}"),
}


def table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['device']}, driver {report.get('driver', '-')}, torch {report['torch']}, triton "
        f"{report.get('triton', '-')}, commit {report['commit'][:12]}",
        "",
        "| " + " | ".join(title for title, _ in COLUMNS.values()) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    for row in report["records"]:
        row = row | {"peak_extra_bytes": row["peak_extra_bytes"] / 1e6}
        row["pass"] = row["pass"].replace("_", " + ")
        cells = [form.format(row[key]) for key, (_, form) in COLUMNS.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Ratio to dense against length, one line per pass, at the first number of kv heads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = report["records"]
    first = rows[0]
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for name, label in (("forward", "forward"), ("forward_backward", "forward + backward")):
        line = [
            (r["seq_len"], r["ratio"])
            for r in rows
            if r["pass"] == name and r["kv_heads"] == first["kv_heads"] and r["R"] == first["R"]
        ]
        if line:
            axes.plot(*zip(*line), marker="o", label=label)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.text(rows[0]["seq_len"], 1.08, "dense SDPA", color="grey", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}K")
    axes.set_xlabel("tokens")
    axes.set_ylabel("speed relative to dense")
    axes.set_title(
        f"Whole path, k={first['k']}, C={first['C']}, R={first['R']}, H={first['heads']}, "
        f"K={first['kv_heads']}, E={first['head_dim']}\n{report['device']}",
        fontsize=9,
    )
    axes.grid(True, which="major", linewidth=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "h200.json"
    report = json.loads(path.read_text())
    (HERE / "table.md").write_text(table(report))
    plot(report, HERE / "speed.png")
    print(table(report))


if __name__ == "__main__":
    main()
