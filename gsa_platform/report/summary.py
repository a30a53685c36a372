"""Closing summary of a run: a box of what was learned and what it cost, and where it all is."""

import math
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

WIDTH, NARROWEST = 99, 60
_LABEL = 21
Row = tuple[str, str]


def render_summary(result: Mapping[str, Any], width: int = WIDTH) -> str:
    """The summary as text, ASCII apart from what `result` itself holds: a box of `width` columns
    (60 to 99), and under it, each whole on a line of its own, what one wants to copy.

    result: any of name, model, data (one line each), steps, tokens, wall_s, loss_first, loss,
    val_loss (nats per token), perplexity, bits_per_byte, tokens_per_s, mfu (share),
    peak_memory_gb, keys_mean, keys_fraction, budget, first_token_attention (share per layer),
    first_token_uniform,
    gate_value_mean, gate_output_mean, recall_first, recall_last (shares), dense_attention_s,
    sparse_attention_s, dense_step_s, step_s, dense_note, run_dir, mlflow_command, notes (list).
    A line whose numbers are missing or None is left out; NaN and infinity print "not finite".
    """
    box = _Box(min(WIDTH, max(NARROWEST, width)), str(result.get("name") or "run"))
    for title, rows in (
        ("", _head(result)),
        ("Learning", _learning(result)),
        ("Cost", _cost(result)),
        ("Attention", _attention(result)),
    ):
        if rows and title:
            box.title(title)
        for label, value in rows:
            box.row(label, value)
    notes = [str(note) for note in result.get("notes") or []]
    if notes:
        box.title("Notes")
    for note in notes:
        box.item(note)
    return "\n".join([*box.closed(), *_where(result)]) + "\n"


class _Box:
    """Lines of text between borders."""

    def __init__(self, width: int, title: str) -> None:
        self.width = width
        title = textwrap.shorten(title, width - 10, placeholder="...")
        self.lines = [f"+-- {title} " + "-" * (width - 6 - len(title)) + "+"]

    def title(self, text: str) -> None:
        self._add("", text)

    def row(self, label: str, value: str) -> None:
        """Label and value; a long word that the column would cut gets lines of its own."""
        room = self.width - 6 - _LABEL
        if max(map(len, value.split())) > room:
            words = textwrap.wrap(value, self.width - 8, break_on_hyphens=False)
            self._add(f"  {label}", *("    " + word for word in words))
            return
        wrapped = textwrap.wrap(value, room, break_on_hyphens=False)
        self._add(*(f"  {'' if i else label:<{_LABEL}}{w}" for i, w in enumerate(wrapped)))

    def item(self, text: str) -> None:
        wrapped = textwrap.wrap(text, self.width - 8) or [""]
        self._add(*(("    " if i else "  - ") + w for i, w in enumerate(wrapped)))

    def closed(self) -> list[str]:
        return [*self.lines, "+" + "-" * (self.width - 2) + "+"]

    def _add(self, *lines: str) -> None:
        self.lines += [f"| {line:<{self.width - 4}} |" for line in lines]


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
            ("Mean gate (0 to 1)", _join([value, output])),
        ]
    )


def _where(r: Mapping[str, Any]) -> list[str]:
    rows = [("run folder:", r.get("run_dir")), ("compare runs:", r.get("mlflow_command"))]
    return [text for label, value in rows if value is not None for text in (label, str(value))]


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
