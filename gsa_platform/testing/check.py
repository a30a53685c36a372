"""A check: a named probe of one component, callable without arguments."""

from __future__ import annotations

import inspect
import unittest
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gsa_platform.testing.case import Case

Function = Callable[[Case], None]
SkipTest = unittest.SkipTest  # pytest and unittest both report it as skipped


@dataclass(frozen=True)
class Probe:
    """A function that raises AssertionError, and when it applies.

    requires: capability flags the component must declare. anywhere: also runs where the component
    itself cannot.
    """

    function: Function
    requires: tuple[str, ...] = ()
    anywhere: bool = False

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def summary(self) -> str:
        """How it probes: the first paragraph of its docstring."""
        return " ".join((inspect.getdoc(self.function) or "").split("\n\n")[0].split())


def probe(*requires: str, anywhere: bool = False) -> Callable[[Function], Probe]:
    """Make a Probe of a function that takes a Case."""
    return lambda function: Probe(function, requires, anywhere)


@dataclass(frozen=True)
class Check:
    """A probe of one case. Calling it raises AssertionError that says what was broken and how it
    was probed, or unittest.SkipTest with the reason why it does not apply."""

    probe: Probe
    case: Case

    def __str__(self) -> str:
        prefix = f"{self.case.mode}-" if self.case.mode else ""
        return prefix + self.probe.name

    def __call__(self) -> None:
        case, flags = self.case, self.probe.requires
        if not self.probe.anywhere:
            if reason := case.unavailable():
                raise SkipTest(reason)
            missing = [flag for flag in flags if not getattr(case.can, flag, True)]
            if missing:
                raise SkipTest(f"{case.slot}={case.name} declares {missing[0]}=False")
        self.probe.function(case)


def checks(cases: Iterable[tuple[Case, Iterable[Probe]]]) -> list[Check]:
    return [Check(probe, case) for case, probes in cases for probe in probes]
