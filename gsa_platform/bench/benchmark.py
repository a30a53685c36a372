"""What a benchmark is, and what it is given to report with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class WrongResultError(Exception):
    """What is to be timed computes something wrong, so that its time would mean nothing."""


@dataclass(frozen=True)
class Progress:
    """say: print a line at once. save: write the report as it is so far, so that a stop loses
    little; a reader of the file never sees half of it."""

    say: Callable[[str], None]
    save: Callable[[dict[str, Any]], None]


class Benchmark:
    """Base of benchmarks; built with its own settings, a BenchmarkSettings.

    A ValueError of the constructor is a user's error. `run` raises WrongResultError where a result
    is wrong, before it is timed.
    """

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def run(self, progress: Progress) -> dict[str, Any]:
        """The report: device, driver, versions, commit and "records", one of each case."""
        raise NotImplementedError(f"{type(self).__name__} does not define run()")

    def render(self, report: dict[str, Any]) -> str:
        """The report, for the terminal."""
        return "\n".join(
            "  ".join(f"{key} {value}" for key, value in row.items()) for row in report["records"]
        )
