"""Tables and plots of reports of `bench attention` and `bench indexer`: of NAME.json NAME.md and
NAME.png, beside it.

python experiments/speed/report.py [file.json ...]

Several files of one kind (other inputs, other heads, same device) are drawn together, under the
name of the first. Layers of a checkpoint appear as their mean.
"""

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COLUMNS = {
    "seq_len": ("tokens", "{:,}"),
    "batch": ("B", "{}"),
    "kv_heads": ("K", "{}"),
    "C": ("C", "{}"),
    "R": ("R", "{}"),
    "inputs": ("inputs", "{}"),
    "layer": ("layer", "{}"),
    "pass": ("pass", "{}"),
    "dense_ms": ("dense, ms", "{:.2f}"),
    "dense_backend": ("by", "{}"),
    "ours_ms": ("whole path, ms", "{:.2f}"),
    "ratio": ("ratio", "{:.1f}x"),
    "host_ms": ("of the host, ms", "{:.2f}"),
    "dense_graph_ms": ("dense in a CUDA graph, ms", "{:.3f}"),
    "graph_ms": ("ours in a CUDA graph, ms", "{:.3f}"),
    "graph_ratio": ("ratio in graphs", "{:.1f}x"),
    "reuse_ms": ("step inside a tile, ms", "{:.3f}"),
    "score_ms": ("scoring, ms", "{:.2f}"),
    "select_ms": ("selection, ms", "{:.2f}"),
    "attend_ms": ("attention, ms", "{:.2f}"),
    "attend_ratio": ("attention alone", "{:.1f}x"),
    "inflation": ("pairs computed", "{:.2f}x"),
    "roofline": ("of the bound", "{:.0%}"),
    "flops_computed_share": ("FLOP/s computed", "{:.0%}"),
    "bytes_share": ("bytes/s", "{:.0%}"),
    "gathered_share": ("gathered bytes/s", "{:.0%}"),
    "peak_extra_bytes": ("extra memory, MB", "{:.0f}"),
    "attend_extra_bytes": ("of the attention, MB", "{:.0f}"),
    "backward_extra_bytes": ("of its backward, MB", "{:.0f}"),
}
INDEXER_COLUMNS = {
    "seq_len": ("tokens", "{:,}"),
    "batch": ("B", "{}"),
    "mode": ("mode", "{}"),
    "C": ("C", "{}"),
    "R": ("R", "{}"),
    "inputs": ("inputs", "{}"),
    "layer": ("layers", "{}"),
    "key_dtype": ("index keys", "{}"),
    "pass": ("what", "{}"),
    "pooling": ("by", "{}"),
    "pool": ("pool", "{}"),
    "survivors": ("survivors", "{}"),
    "nothing_left_out": ("all survive", "{:.1%}"),
    "cost": ("scores computed", "{:.1%}"),
    "recall": ("recall of the exact choice", "{:.1%}"),
    "recall_worst": ("worst layer", "{:.1%}"),
    "mass": ("mass covered", "{:.1%}"),
    "mass_exact": ("by the exact choice", "{:.1%}"),
    "mass_best": ("by the best", "{:.1%}"),
    "mass_chance": ("by chance", "{:.1%}"),
    "gain_kept": ("gain over chance kept", "{:.0%}"),
    "proven": ("proven exact", "{:.1%}"),
    "score_ms": ("scoring, ms", "{:.2f}"),
    "select_ms": ("selection, ms", "{:.2f}"),
    "choose_ms": ("both, ms", "{:.2f}"),
    "topk_ms": ("torch.topk, ms", "{:.2f}"),
    "ratio": ("ratio", "{:.1f}x"),
    "attend_ms": ("attention, ms", "{:.2f}"),
    "mass_ms": ("its mass, ms", "{:.2f}"),
    "selected_kl_ms": ("KL on selected, ms", "{:.2f}"),
    "dense_kl_ms": ("KL on all, ms", "{:.2f}"),
    "dense_rows": ("tiles", "{}"),
}
# Of a layer: the rest of a record says what was measured.
MEASURED = (
    "cost", "nothing_left_out", "recall", "mass", "mass_exact", "mass_best", "mass_chance",
    "proven", "overlap",
    "ratio", "score_ms", "select_ms", "choose_ms", "topk_ms", "attend_ms", "mass_ms",
    "selected_kl_ms", "dense_kl_ms", "peak_extra_bytes", "topk_extra_bytes", "selected_kl_share",
    "dense_kl_share",
)  # fmt: skip
UNMEASURED = re.compile("host_ms|graph_ms|.*_extra_bytes")  # where they are 0
GROUP = ("mode", "C", "R", "kv_heads", "inputs")


def table(report: dict[str, Any], columns: dict[str, tuple[str, str]]) -> str:
    """Markdown: the columns that a record has, but what a CPU does not measure and notes as 0."""
    rows = report["records"]
    columns = {
        n: c
        for n, c in columns.items()
        if any(row[n] or not UNMEASURED.fullmatch(n) for row in rows if n in row)
    }
    lines = [
        f"{report['device']}, driver {report.get('driver', '-')}, torch {report['torch']}, triton "
        f"{report.get('triton', '-')}, commit {report['commit']}",
        "",
        "| " + " | ".join(title for title, _ in columns.values()) + " |",
        "|---" * len(columns) + "|",
    ]
    for row in rows:
        row = row | {n: row[n] / 1e6 for n in row if n.endswith("_extra_bytes")}
        row["pass"] = row["pass"].replace("_", " + ")
        cells = [form.format(row[n]) if n in row else "" for n, (_, form) in columns.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" + _beside(rows)


def over_layers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record for those that differ in the layer alone: means, and the recall of the worst."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        same = tuple((k, v) for k, v in row.items() if k != "layer" and k not in MEASURED)
        groups.setdefault(same, []).append(row)
    return [_mean(group) for group in groups.values()]


def _mean(group: list[dict[str, Any]]) -> dict[str, Any]:
    row = dict(group[0])
    if len(group) > 1:
        for name in (n for n in MEASURED if n in row):
            row[name] = sum(r[name] for r in group) / len(group)
        row["layer"] = ", ".join(str(r["layer"]) for r in group)
        if "recall" in row:
            row["recall_worst"] = min(r["recall"] for r in group)
    gain = row.get("mass_exact", 0.0) - row.get("mass_chance", 0.0)
    if gain > 0.2 * row.get("mass_chance", 1.0):  # else the exact choice is as good as any
        row["gain_kept"] = (row["mass"] - row["mass_chance"]) / gain
    return row


def _beside(rows: list[dict[str, Any]]) -> str:
    """A second table: other implementations over the same selection."""
    cells = [
        (f"{row['seq_len']:,}", row["pass"].replace("_", " + "), name, version,
         other.get("reason", f"{other.get('ms', 0):.2f}"), f"{row['attend_ms']:.2f}")
        for row in rows
        for name, other in row.get("beside", {}).items()
        for version in [other.get("version", "")]
    ]  # fmt: skip
    if not cells:
        return ""
    head = ("tokens", "pass", "same selection by", "version", "ms", "ours, ms")
    lines = ["", *(f"| {' | '.join(c)} |" for c in [head, ("---",) * len(head), *cells])]
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Ratio to dense, and milliseconds of both, against length; a line per pass and setting. With
    decoding, a second row of the same, a line per batch."""
    from matplotlib import pyplot as plt

    rows = report["records"]
    whole = [r for r in rows if r["pass"] != "decode"]
    steps = [r for r in rows if r["pass"] == "decode"]
    kinds = [(name, part) for name, part in (("prefill", whole), ("decode", steps)) if part]
    figure, axes = plt.subplots(len(kinds), 2, figsize=(11, 4.2 * len(kinds)), squeeze=False)
    for (name, part), (left, right) in zip(kinds, axes, strict=True):
        varied = [key for key in GROUP if len({r[key] for r in part}) > 1]
        lines: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for r in sorted(part, key=lambda r: r["seq_len"]):
            first = r["pass"] if r["pass"] != "decode" else f"batch {r['batch']}"
            lines.setdefault((first, *(r[k] for k in varied)), []).append(r)
        for i, (key, mine) in enumerate(lines.items()):
            shown = [str(key[0]).replace("_", " + ")]
            shown += [f"{k}={v}" for k, v in zip(varied, key[1:], strict=True)]
            label, x = " ".join(shown), [r["seq_len"] for r in mine]
            left.plot(x, [r["ratio"] for r in mine], marker="o", color=f"C{i}", label=label)
            right.plot(x, [r["ours_ms"] for r in mine], marker="o", color=f"C{i}", label=label)
            dense = [r["dense_ms"] for r in mine]
            right.plot(x, dense, "--", marker=".", color=f"C{i}", label=f"{label}, dense")
        left.axhline(1, color="grey", linewidth=0.8)
        left.set_ylabel("speed relative to dense")
        right.set_ylabel("milliseconds")
        left.set_title(f"{name}, whole path: {_subject(part)}", fontsize=8)
        right.set_title(report["device"], fontsize=8)
        _length_axis(left, part, "{:g}x")
        _length_axis(right, part, "{:g}")
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)


def plot_indexer(report: dict[str, Any], path: Path) -> None:
    """Scoring and selection beside torch.topk; the objective beside the attention; recall against
    cost of coarse to fine, at the longest length."""
    from matplotlib import pyplot as plt

    rows = report["records"]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2))
    select = [r for r in rows if r["pass"] == "select"]
    learn = [r for r in rows if r["pass"] == "objective"]
    for axes, part, lines in (
        (left, select, {"choose_ms": "select", "score_ms": "scoring", "topk_ms": "torch.topk"}),
        (
            middle,
            learn,
            {
                "attend_ms": "attention",
                "selected_kl_ms": "KL on selected",
                "dense_kl_ms": "KL on all keys of a few tiles",
            },
        ),
    ):
        for mode in sorted({r["mode"] for r in part}):
            mine = sorted((r for r in part if r["mode"] == mode), key=lambda r: r["seq_len"])
            for i, (key, label) in enumerate(lines.items()):
                style = {"tile": "-", "block": "--", "token": ":"}[mode]
                x, y = [r["seq_len"] for r in mine], [r[key] for r in mine]
                axes.plot(x, y, style, marker="o", color=f"C{i}", label=f"{label}, {mode}")
        axes.set_ylabel("milliseconds")
        if part:
            _length_axis(axes, part, "{:g}")
    left.set_title("scoring and selection", fontsize=9)
    middle.set_title("objective, forward + backward", fontsize=9)
    _recall(right, [r for r in rows if r["pass"] == "hierarchical"])
    figure.suptitle(f"{report['device']}; {_subject(rows)}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)


COLOURS = {"mean": "C0", "max": "C1", "bound": "C2"}


def plot_coarse(report: dict[str, Any], path: Path) -> None:
    """Coarse to fine: recall of the exact choice, and the share of the attention it gains over
    chance that is kept, against the scores computed; a row of axes per kind of inputs and
    granularity, a column per size of pooling blocks, a colour per pooling."""
    from matplotlib import pyplot as plt

    rows = [r for r in report["records"] if r["pass"] == "hierarchical"]
    kinds: dict[tuple[Any, ...], dict[int, list[dict[str, Any]]]] = {}
    for r in sorted(rows, key=lambda r: r["pool"]):
        kinds.setdefault((r["inputs"], r["mode"], r["C"]), {}).setdefault(r["pool"], []).append(r)
    shape = (len(kinds), max(map(len, kinds.values())))
    size = (2.6 * shape[1] + 1, 2.6 * shape[0] + 1)
    figure, grid = plt.subplots(*shape, figsize=size, squeeze=False, sharey=True)
    for ((inputs, mode, c), by_pool), line in zip(kinds.items(), grid, strict=True):
        line[0].set_ylabel("share of the exact choice's", fontsize=8)
        for axes, (pool, mine) in zip(line, by_pool.items(), strict=False):
            _costs(axes, mine)
            axes.set_title(f"{inputs}, {mode} mode, C={c}, pool {pool}", fontsize=8)
        for axes in line[len(by_pool) :]:
            axes.set_visible(False)
    handles, labels = max(
        (axes.get_legend_handles_labels() for axes in grid.flat), key=lambda found: len(found[1])
    )
    columns = len(labels) // 2
    figure.legend(handles, labels, loc="lower center", ncols=columns, frameon=False, fontsize=8)
    figure.suptitle(f"{report['device']}; {_subject(rows)}, {_tokens(rows[0]['seq_len'])} tokens",
                    fontsize=9)  # fmt: skip
    figure.tight_layout(rect=(0, 0.5 / size[1], 1, 1))
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _costs(axes: Any, rows: list[dict[str, Any]]) -> None:
    for pooling, colour in COLOURS.items():
        mine = sorted((r for r in rows if r["pooling"] == pooling), key=lambda r: r["cost"])
        cost = [r["cost"] for r in mine]
        for name, style, label in (("recall", "-", "keys"), ("gain_kept", "--", "attention")):
            y = [r[name] for r in mine if name in r]
            if y:
                axes.plot(cost, y, style, marker=".", color=colour, label=f"{pooling}: {label}")
    axes.plot([0, 1], [0, 1], ":", color="grey", linewidth=0.8)
    axes.set_xlim(0, max(0.7, *(r["cost"] for r in rows)))
    axes.set_xlabel("scores computed, of all", fontsize=8)
    axes.set_ylim(0, 1.05)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.tick_params(labelsize=7)
    axes.grid(True, which="major", linewidth=0.3)


def _recall(axes: Any, rows: list[dict[str, Any]]) -> None:
    if not rows:
        axes.set_axis_off()
        return
    longest = max(r["seq_len"] for r in rows)
    rows = [r for r in rows if r["seq_len"] == longest]
    kinds = sorted({(r.get("pooling", "mean"), r["pool"]) for r in rows})
    colour = {pool: f"C{i}" for i, pool in enumerate(sorted({pool for _, pool in kinds}))}
    for pooling, pool in kinds:
        same = [r for r in rows if (r.get("pooling", "mean"), r["pool"]) == (pooling, pool)]
        mine = sorted(same, key=lambda r: r["survivors"])
        # Before there was a mean over tiles, the last tile's.
        cost = [r["cost"] if "cost" in r else r["scored"] / r["scored_exact"] for r in mine]
        style = {"mean": "-", "max": ":", "bound": "--"}[pooling]
        axes.plot(cost, [r["recall"] for r in mine], style, marker="o", color=colour[pool],
                  label=f"{pooling} of {pool} keys")  # fmt: skip
        for x, r in zip(cost, mine, strict=True):
            axes.annotate(r["survivors"], (x, r["recall"]), fontsize=6, xytext=(2, 3),
                          textcoords="offset points")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.set_xlabel("scores computed, of the exact indexer's")
    axes.set_ylabel("recall of the exact choice")
    axes.set_title(f"coarse to fine, {longest:,} tokens; numbers: survivors", fontsize=9)
    axes.grid(True, which="major", linewidth=0.3)
    axes.legend(frameon=False, fontsize=7, handlelength=3)


def _length_axis(axes: Any, rows: list[dict[str, Any]], form: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({r["seq_len"] for r in rows}))
    axes.xaxis.set_major_formatter(lambda value, _: _tokens(value))
    axes.minorticks_off()
    low, high = axes.get_ylim()
    if high < 100 * low:  # decades alone would leave it without numbers
        axes.set_yticks([d * 10**e for e in range(-4, 7) for d in (1, 2, 5)])
        axes.set_ylim(low, high)
    axes.yaxis.set_major_formatter(lambda value, _: form.format(value))
    axes.set_xlabel("tokens")
    axes.grid(True, which="major", linewidth=0.3)
    axes.legend(frameon=False, fontsize=7, handlelength=3)


def _tokens(value: float) -> str:
    return f"{value / 2**20:g}M" if value >= 2**20 else f"{value / 1024:g}K"


def _subject(rows: list[dict[str, Any]]) -> str:
    """What all records have in common."""
    names = {"heads": "H", "kv_heads": "K", "head_dim": "E", "k": "k", "C": "C", "R": "R"}
    same = [(t, {r[n] for r in rows}) for n, t in names.items()]
    return ", ".join(f"{t}={v.pop()}" for t, v in same if len(v) == 1)


def merged(paths: Iterable[Path]) -> dict[str, Any]:
    """One report with the records of all; raises ValueError unless they are of one device."""
    reports = [json.loads(path.read_text()) for path in paths]
    if len({r["device"] for r in reports}) > 1:
        raise ValueError("these reports are of different devices")
    commits = " and ".join(dict.fromkeys(r["commit"][:12] for r in reports))
    rows = [row for r in reports for row in r["records"]]
    return reports[0] | {"records": rows, "commit": commits}


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    paths = [Path(text) for text in sys.argv[1:]] or [HERE / "h200.json"]
    report, name = merged(paths), paths[0].with_suffix("")
    indexer = any("topk_ms" in row for row in report["records"])
    if indexer:
        report["records"] = over_layers(report["records"])
    text = table(report, INDEXER_COLUMNS if indexer else COLUMNS)
    name.with_suffix(".md").write_text(text)
    masses = [r for r in report["records"] if r["pass"] == "hierarchical" and "mass" in r]
    learns = any(r["pass"] == "objective" for r in report["records"])
    drawing = plot_coarse if masses and not learns else plot_indexer if indexer else plot
    # Speed against length is no curve at one length.
    if drawing is not plot or len({r["seq_len"] for r in report["records"]}) > 1:
        drawing(report, name.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
