"""Reports of the benchmarks as text: a line for each case, a table at the end."""

from typing import Any

_ATTENTION = {
    "layer": ("layer", "{}"),
    "seq_len": ("tokens", "{:,}"),
    "batch": ("B", "{}"),
    "kv_heads": ("K", "{}"),
    "C": ("C", "{}"),
    "R": ("R", "{}"),
    "key_dtype": ("index keys", "{}"),
    "pass": ("pass", "{}"),
    "dense_ms": ("dense ms", "{:.3f}"),
    "dense_backend": ("by", "{}"),
    "ours_ms": ("ours ms", "{:.3f}"),
    "ratio": ("ratio", "{:.2f}x"),
    "score_ms": ("score", "{:.3f}"),
    "select_ms": ("select", "{:.3f}"),
    "attend_ms": ("attend", "{:.3f}"),
    "host_ms": ("host", "{:.3f}"),
    "dense_graph_ms": ("dense graph", "{:.3f}"),
    "graph_ms": ("ours graph", "{:.3f}"),
    "graph_ratio": ("ratio graph", "{:.2f}x"),
    "inflation": ("computed", "{:.2f}x"),
    "roofline": ("of bound", "{:.0%}"),
    "flops_share": ("of FLOP/s", "{:.0%}"),
    "bytes_share": ("of bytes/s", "{:.0%}"),
    "peak_extra_bytes": ("extra MB", "{:.0f}"),
}
_UNMEASURED = ("host_ms", "graph_ms", "peak_extra_bytes")  # where they are 0
_INDEXER = {
    "layer": ("layer", "{}"),
    "seq_len": ("tokens", "{:,}"),
    "batch": ("B", "{}"),
    "C": ("C", "{}"),
    "R": ("R", "{}"),
    "key_dtype": ("index keys", "{}"),
    "pass": ("what", "{}"),
    "pooling": ("by", "{}"),
    "pool": ("pool", "{}"),
    "survivors": ("survivors", "{}"),
    "nothing_left_out": ("all survive", "{:.1%}"),
    "cost": ("cost", "{:.1%}"),
    "recall": ("recall", "{:.1%}"),
    "mass": ("mass", "{:.1%}"),
    "mass_exact": ("of the exact choice", "{:.1%}"),
    "mass_best": ("possible", "{:.1%}"),
    "mass_chance": ("by chance", "{:.1%}"),
    "proven": ("proven exact", "{:.1%}"),
    "score_ms": ("score ms", "{:.3f}"),
    "select_ms": ("select ms", "{:.3f}"),
    "choose_ms": ("both ms", "{:.3f}"),
    "topk_ms": ("torch.topk ms", "{:.3f}"),
    "ratio": ("ratio", "{:.2f}x"),
    "attend_ms": ("attention ms", "{:.3f}"),
    "selected_kl_ms": ("KL selected ms", "{:.3f}"),
    "dense_kl_ms": ("KL all ms", "{:.3f}"),
}


def attention_line(row: dict[str, Any]) -> str:
    """One case, as it is done."""
    parts = f"score {row['score_ms']:.3f} + select {row['select_ms']:.3f}"
    return (
        f"{row['seq_len']:>9,} x {row['batch']:<2} K={row['kv_heads']:<2} R={row['R']:<3} "
        f"{row['key_dtype']:<4} "
        f"{row['pass']:<16} dense {row['dense_ms']:.3f} ms ({row['dense_backend']})  "
        f"ours {row['ours_ms']:.3f} ({parts} + attend {row['attend_ms']:.3f})  "
        f"{row['ratio']:.2f} x"
    )


def attention_table(report: dict[str, Any]) -> str:
    """Every record, then what stood beside it, and what was left out."""
    lines = [_head(report), table(_ATTENTION, report["records"])]
    for row in report["records"]:
        for name, other in row.get("beside", {}).items():
            label = f"{name:<12} {row['seq_len']:>9,} {row['pass']:<16}"
            if "ms" in other:
                share = other["ms"] / row["attend_ms"]
                lines.append(f"{label} {other['ms']:.3f} ms, {share:.2f} x our attention's time")
            else:
                lines.append(f"{label} {other['reason']}")
    return "\n".join([*lines, *(f"skipped: {why}" for why in report["skipped"])])


def indexer_line(row: dict[str, Any]) -> str:
    """One case, as it is done."""
    shown = [f"{t} {f.format(row[n])}" for n, (t, f) in _INDEXER.items() if n in row]
    return ", ".join(shown)


def indexer_table(report: dict[str, Any]) -> str:
    """Every record, and what was left out."""
    lines = [_head(report), table(_INDEXER, report["records"])]
    return "\n".join([*lines, *(f"skipped: {why}" for why in report["skipped"])])


def _head(report: dict[str, Any]) -> str:
    return (
        f"{report['device']}, driver {report['driver']}, torch {report['torch']}, triton "
        f"{report['triton']}; matrix product {report['matmul_flops'] / 1e12:.2f} TFLOP/s, copy "
        f"{report['copy_bytes_s'] / 1e9:.0f} GB/s"
    )


def table(columns: dict[str, tuple[str, str]], records: list[dict[str, Any]]) -> str:
    """The columns that a record has, aligned to the right, but for what a CPU does not measure."""
    columns = {
        n: c
        for n, c in columns.items()
        if any(row[n] or n not in _UNMEASURED for row in records if n in row)
    }
    rows = [[title for title, _ in columns.values()]]
    for row in records:
        shown = row | {"peak_extra_bytes": row.get("peak_extra_bytes", 0) / 1e6}
        shown["pass"] = row["pass"].replace("_", "+")
        rows.append([f.format(shown[n]) if n in shown else "" for n, (_, f) in columns.items()])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
