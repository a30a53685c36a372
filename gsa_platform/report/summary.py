"""Closing summary of a run: a plain-text box of what was learned, what it cost and where it is."""

import math
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

WIDTH = 99
_LABEL = 21
_VALUE = WIDTH - 4 - _LABEL
Row = tuple[str, str]


def render_summary(result: Mapping[str, Any]) -> str:
    """The summary as text of at most 99 columns, ASCII apart from what `result` itself holds.

    result: any of name, model, data (one line each), steps, tokens, wall_s, loss_first, loss,
    val_loss (nats per token), perplexity, bits_per_byte, tokens_per_s, mfu (share),
    peak_memory_gb, keys_mean, keys_fraction, budget, first_token_attention (share per layer),
    first_token_uniform,
    gate_value_mean, gate_output_mean, recall_first, recall_last (shares), dense_attention_s,
    sparse_attention_s, dense_step_s, step_s, dense_note, run_dir, mlflow_command, notes (list).
    A line whose numbers are missing or None is left out; NaN and infinity print "not finite".
    """
    lines = [_rule(str(result.get("name") or "run"))]
    for title, rows in (
        ("", _head(result)),
        ("Learning", _learning(result)),
        ("Cost", _cost(result)),
        ("Attention", _attention(result)),
        ("Where", _where(result)),
    ):
        if not rows:
            continue
        if title:
            lines += [_line(""), _line(title)]
        for label, value in rows:
            lines += _row(label, value, whole=title == "Where")
    notes = [str(note) for note in result.get("notes") or []]
    if notes:
        lines += [_line(""), _line("Notes")]
        for note in notes:
            wrapped = textwrap.wrap(note, WIDTH - 8) or [""]
            lines += [_line(("  - " if i == 0 else "    ") + w) for i, w in enumerate(wrapped)]
    lines.append("+" + "-" * (WIDTH - 2) + "+")
    return "\n".join(lines) + "\n"


def _head(r: Mapping[str, Any]) -> list[Row]:
    return _rows([("Model", _text(r, "model")), ("Data", _text(r, "data"))])


def _learning(r: Mapping[str, Any]) -> list[Row]:
    steps, tokens = _number(r, "steps", ",.0f", " steps"), _number(r, "tokens", ",.0f", " tokens")
    first, last = _number(r, "loss_first", ".4f"), _number(r, "loss", ".4f", " nats/token")
    loss = f"{first} -> {last} (first -> last step)" if first and last else last
    return _rows(
        [
            ("Trained", _join([steps, tokens])),
            ("Training loss", loss),
            ("Validation loss", _number(r, "val_loss", ".4f", " nats/token")),
            ("Perplexity", _number(r, "perplexity", ",.2f", " per token")),
            ("Compression", _number(r, "bits_per_byte", ".4f", " bits/byte")),
        ]
    )


def _cost(r: Mapping[str, Any]) -> list[Row]:
    rate = _join(
        [
            _number(r, "tokens_per_s", ",.0f", " tokens/s"),
            _percent(r, "mfu", " of peak FLOP/s (MFU)"),
        ]
    )
    rows = [
        ("Wall time", _duration(r.get("wall_s"))),
        ("Throughput", rate),
        ("Peak memory", _number(r, "peak_memory_gb", ".2f", " GB")),
        ("Training step", _versus(r, "step_s", "dense_step_s")),
        ("Attention, one layer", _versus(r, "sparse_attention_s", "dense_attention_s")),
        ("", _text(r, "dense_note")),
    ]
    return _rows(rows)


def _attention(r: Mapping[str, Any]) -> list[Row]:
    keys = _join(
        [
            _number(r, "keys_mean", ",.1f", " per query (mean)"),
            _percent(r, "keys_fraction", " of the causal keys"),
            _number(r, "budget", ",.0f", " budget"),
        ]
    )
    recall_first, recall_last = _percent(r, "recall_first"), _percent(r, "recall_last")
    recall = ""
    if recall_first and recall_last:
        recall = f"{recall_first} -> {recall_last} of dense attention mass covered (first -> last)"
    elif recall_first or recall_last:
        recall = f"{recall_last or recall_first} of dense attention mass covered"
    value = _number(r, "gate_value_mean", ".3f", " value")
    output = _number(r, "gate_output_mean", ".3f", " output")
    return _rows(
        [
            ("Keys attended", keys),
            ("Selection recall", recall),
            ("First-token share", _first_token(r)),
            ("Mean gate", _join([value, output])),
        ]
    )


def _where(r: Mapping[str, Any]) -> list[Row]:
    return _rows(
        [("Run folder", _text(r, "run_dir")), ("Compare runs", _text(r, "mlflow_command"))]
    )


def _first_token(r: Mapping[str, Any]) -> str:
    layers = r.get("first_token_attention")
    if layers is None or len(layers) == 0:
        return ""
    shares = [float(layer) for layer in layers]
    finite = [share for share in shares if math.isfinite(share)]
    if len(finite) < len(shares):
        return f"not finite in {len(shares) - len(finite)} of {len(shares)} layers"
    top = max(range(len(shares)), key=shares.__getitem__)
    parts = [f"{100 * sum(shares) / len(shares):.2f} % mean over layers"]
    if len(shares) > 1:
        parts.append(f"{100 * shares[top]:.2f} % in layer {top}")
    parts.append(_percent(r, "first_token_uniform", " if uniform", digits=2))
    return _join(parts)


def _versus(r: Mapping[str, Any], key: str, dense_key: str) -> str:
    """`own, dense, ratio`; the ratio only where both are finite and positive."""
    own, dense = r.get(key), r.get(dense_key)
    parts = [_seconds(own), _seconds(dense) and f"{_seconds(dense)} dense"]
    if own is not None and dense is not None:
        own, dense = float(own), float(dense)
        if math.isfinite(own) and math.isfinite(dense) and own > 0 and dense > 0:
            faster = dense >= own
            factor = dense / own if faster else own / dense
            parts.append(f"{factor:.2f} x {'faster' if faster else 'slower'} than dense")
    return _join(parts)


def _number(r: Mapping[str, Any], key: str, spec: str, unit: str = "") -> str:
    value = r.get(key)
    if value is None:
        return ""
    value = float(value)
    return f"{value:{spec}}{unit}" if math.isfinite(value) else f"not finite{unit}"


def _percent(r: Mapping[str, Any], key: str, unit: str = "", digits: int = 1) -> str:
    value = r.get(key)
    if value is None:
        return ""
    return _number({key: 100 * float(value)}, key, f".{digits}f", f" %{unit}")


def _seconds(value: Any) -> str:
    if value is None:
        return ""
    value = float(value)
    if not math.isfinite(value):
        return "not finite s"
    if value < 1e-3:
        return f"{1e6 * value:.1f} us"
    return f"{1e3 * value:.2f} ms" if value < 1 else f"{value:.2f} s"


def _duration(value: Any) -> str:
    if value is None:
        return ""
    value = float(value)
    if not math.isfinite(value):
        return "not finite s"
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    tail = f"{minutes} min {seconds:02d} s"
    return f"{hours} h {tail}" if hours else tail


def _text(r: Mapping[str, Any], key: str) -> str:
    value = r.get(key)
    return "" if value is None else " ".join(str(value).split())


def _join(parts: Iterable[str]) -> str:
    return ", ".join(part for part in parts if part)


def _rows(rows: Iterable[Row]) -> list[Row]:
    return [(label, value) for label, value in rows if value]


def _row(label: str, value: str, whole: bool = False) -> list[str]:
    """Label and value; a value that the column would cut where it must be copied (whole: a path or
    a command; or a single long word) gets lines of its own."""
    if len(value if whole else max(value.split(), key=len)) > _VALUE - 2:
        words = textwrap.wrap(value, WIDTH - 8, break_on_hyphens=False)
        return [_line(f"  {label}"), *(_line("    " + word) for word in words)]
    wrapped = textwrap.wrap(value, _VALUE - 2, break_on_hyphens=False)
    return [
        _line(f"  {label if i == 0 else '':<{_LABEL}}{part}") for i, part in enumerate(wrapped)
    ]


def _line(text: str) -> str:
    return f"| {text:<{WIDTH - 4}} |"


def _rule(title: str) -> str:
    title = textwrap.shorten(title, WIDTH - 10, placeholder="...")
    return f"+-- {title} " + "-" * (WIDTH - 6 - len(title)) + "+"
