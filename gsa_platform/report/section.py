"""Sections of the closing summary that plugins add: what they are given, how they are asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gsa_platform.registry import Registry

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class FinishedRun:
    """A training that is over, as a section sees it.

    summary: the numbers of the closing summary so far (see render_summary); cfg: the resolved
    configuration; module: the LanguageModel; data: the data module; trainer: Lightning's.
    """

    summary: Mapping[str, Any]
    cfg: Any
    module: Any
    data: Any
    trainer: Any


def sections(run: FinishedRun, plugins: Registry) -> list[tuple[str, Rows]]:
    """(title, rows) of every section that has something to say, in the order of the plugins.

    A section that fails says so in its place: the run it tells of is over and well.
    """
    told = []
    for name in plugins.entries["report_section"]:
        try:
            rows = [(str(a), str(b)) for a, b in plugins.target("report_section", name)(run) if b]
        except Exception as error:
            rows = [("failed", f"{type(error).__name__}: {error}")]
        if rows:
            told.append((name.replace("_", " ").capitalize(), rows))
    return told
