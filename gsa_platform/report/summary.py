"""Closing summary of a run: a box of what was learned and what it cost, and where it all is."""

import math
import textwrap
from collections.abc import Mapping
from typing import Any

from gsa_platform.report.words import Row, duration, join, number, percent, rows, seconds, text

WIDTH, NARROWEST = 99, 60
_LABEL = 21


def render_summary(result: Mapping[str, Any], width: int = WIDTH) -> str:
    """The summary as text, ASCII apart from what `result` itself holds: a box of `width` columns
    (60 to 99), and under it, each whole on a line of its own, what one wants to copy.

    result: any of name, model, data (one line each), steps, tokens, wall_s, loss_first, loss,
    val_loss (nats per token), perplexity, bits_per_byte, tokens_per_s, mfu (share),
    peak_memory_gb, dense_attention_s,
    sparse_attention_s, dense_step_s, step_s, dense_note, run_dir, mlflow_command, notes (list),
    sections (list of (title, rows), from report/section.py).
    A line whose numbers are missing or None is left out; NaN and infinity print "not finite".
    """
    box = _Box(min(WIDTH, max(NARROWEST, width)), str(result.get("name") or "run"))
    for title, lines in (
        ("", _head(result)),
        ("Learning", _learning(result)),
        ("Cost", _cost(result)),
        *(result.get("sections") or []),
    ):
        if lines and title:
            box.title(title)
        for label, value in lines:
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
    return rows([("Model", text(r, "model")), ("Data", text(r, "data"))])


def _learning(r: Mapping[str, Any]) -> list[Row]:
    steps, tokens = number(r, "steps", ",.0f", " steps"), number(r, "tokens", ",.0f", " tokens")
    first, last = number(r, "loss_first", ".4f"), number(r, "loss", ".4f", " nats/token")
    loss = f"{first} -> {last} (first -> last step)" if first and last else last
    return rows(
        [
            ("Trained", join([steps, tokens])),
            ("Training loss", loss),
            ("Validation loss", number(r, "val_loss", ".4f", " nats/token")),
            ("Perplexity", number(r, "perplexity", ",.2f", " per token")),
            ("Compression", number(r, "bits_per_byte", ".4f", " bits/byte")),
        ]
    )


def _cost(r: Mapping[str, Any]) -> list[Row]:
    rate = join(
        [
            number(r, "tokens_per_s", ",.0f", " tokens/s"),
            percent(r, "mfu", " of peak FLOP/s (MFU)"),
        ]
    )
    return rows(
        [
            ("Wall time", duration(r.get("wall_s"))),
            ("Throughput", rate),
            ("Peak memory", number(r, "peak_memory_gb", ".2f", " GB")),
            ("Training step", _versus(r, "step_s", "dense_step_s")),
            ("Attention, one layer", _versus(r, "sparse_attention_s", "dense_attention_s")),
            ("", text(r, "dense_note")),
        ]
    )


def _where(r: Mapping[str, Any]) -> list[str]:
    rows = [("run folder:", r.get("run_dir")), ("compare runs:", r.get("mlflow_command"))]
    return [text for label, value in rows if value is not None for text in (label, str(value))]


def _versus(r: Mapping[str, Any], key: str, dense_key: str) -> str:
    """`own, dense, ratio`; the ratio only where both are finite and positive."""
    own, dense = r.get(key), r.get(dense_key)
    parts = [seconds(own), seconds(dense) and f"{seconds(dense)} dense"]
    if own is not None and dense is not None:
        own, dense = float(own), float(dense)
        if math.isfinite(own) and math.isfinite(dense) and own > 0 and dense > 0:
            faster = dense >= own
            factor = dense / own if faster else own / dense
            parts.append(f"{factor:.2f} x {'faster' if faster else 'slower'} than dense")
    return join(parts)
