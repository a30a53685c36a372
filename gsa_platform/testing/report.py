"""Run the checks of a component and show the outcome as a table."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gsa_platform.testing.catalogue import slot_checks
from gsa_platform.testing.check import SkipTest

WIDTH = 99


@dataclass(frozen=True)
class Result:
    """One check: ok, skipped, FAILED (a contract is broken) or ERROR (anything else)."""

    name: str
    outcome: str
    seconds: float
    text: str  # what was broken and how it was probed; the reason of a skip; else how it probes

    @property
    def bad(self) -> bool:
        return self.outcome in ("FAILED", "ERROR")


@dataclass(frozen=True)
class Report:
    """The results of one component."""

    slot: str
    name: str
    results: tuple[Result, ...]

    @property
    def failed(self) -> list[str]:
        """Names of the checks that did not pass."""
        return [result.name for result in self.results if result.bad]

    def __str__(self) -> str:
        return self.table()

    def table(self, verbose: bool = False) -> str:
        """One line per check; below it what was broken and how it was probed (verbose: also how
        those probe that passed), and the reason why one was skipped."""
        names = max([len(r.name) for r in self.results] + [5])
        lines = [f"{'check'.ljust(names)}  result   seconds"]
        before = ""
        for r in self.results:
            lines.append(f"{r.name.ljust(names)}  {r.outcome:<7}  {r.seconds:7.2f}")
            repeats, before = r.text == before, r.text
            if (r.outcome != "ok" or verbose) and not repeats:
                lines += textwrap.wrap(
                    r.text, WIDTH, initial_indent="    ", subsequent_indent="    "
                )
        counts = [(word, sum(r.outcome == word for r in self.results)) for word in _OUTCOMES]
        told = ", ".join(f"{n} {word}" for word, n in counts if n)
        seconds = sum(r.seconds for r in self.results)
        lines.append(f"{self.slot}={self.name}: {told} in {seconds:.1f} s")
        return "\n".join(lines)


_OUTCOMES = ("ok", "skipped", "FAILED", "ERROR")


def run_checks(
    slot: str,
    name: str,
    settings: dict[str, Any] | None = None,
    beside: Sequence[str] = (),
    leave_out: Iterable[str] = (),
    say: Callable[[str], None] | None = None,
) -> Report:
    """Run the checks of a component, but those whose probe is named in leave_out.

    A check that fails does not raise; settings that cannot be composed raise UserError. say: told
    each result.
    """
    left_out, results = set(leave_out), []
    found = slot_checks(slot, name, settings, beside)
    if (settings or beside) and not found[0].case.unavailable():
        for case in {id(c.case): c.case for c in found}.values():
            case.config()
    for check in found:
        if check.probe.name in left_out:
            continue
        start = time.perf_counter()
        outcome, text = "ok", check.probe.summary
        try:
            check()
        except SkipTest as reason:
            outcome, text = "skipped", str(reason)
        except AssertionError as error:
            outcome, text = "FAILED", str(error)
        except Exception as error:
            outcome = "ERROR"
            text = f"{type(error).__name__}: {error} ({check.probe.summary})"
        result = Result(str(check), outcome, time.perf_counter() - start, text)
        results.append(result)
        if say is not None:
            say(f"{result.outcome:<8} {result.name}")
    return Report(slot, name, tuple(results))
