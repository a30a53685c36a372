"""``plugins matrix``: try every combination of components and say what becomes of each."""

from __future__ import annotations

import json
import sys
import time

from gsa_platform.components import SLOTS
from gsa_platform.errors import UserError

USAGE = (
    "Usage: gsa-platform plugins matrix [--slot SLOT ...] [slot=NAME,NAME ...] [--json]\n"
    "  --slot varies only these slots, slot=NAME,NAME tries only these names; every combination\n"
    "  is composed, validated, built and run once. --device cuda runs them on a GPU."
)


def matrix(arguments: list[str]) -> int:
    """Print the matrix; returns 1 if a combination neither works nor is refused with a reason."""
    varied, given, device, as_json = _parse(arguments)
    import torch

    from gsa_platform.testing.matrix import BROKEN, Matrix, Outcome
    from gsa_platform.testing.matrix_text import render, row

    torch.set_num_threads(1)  # shapes this small only lose by more
    start = time.perf_counter()
    live = sys.stderr.isatty()

    def say(outcome: Outcome) -> None:
        if live:
            print(f"\r\033[K{outcome.combination}"[:95], end="", file=sys.stderr, flush=True)

    outcomes = Matrix(varied, given, device).run(say)
    if live:
        print("\r\033[K", end="", file=sys.stderr)
    seconds = time.perf_counter() - start
    if as_json:
        rows = [
            {
                **dict(zip(SLOTS, row(o.combination), strict=True)),
                "result": o.result,
                "reason": o.reason,
                "seconds": o.seconds,
            }
            for o in outcomes
        ]
        print(json.dumps({"seconds": round(seconds, 1), "combinations": rows}, indent=1))
    else:
        print(render(outcomes, seconds))
    return 1 if any(o.result == BROKEN for o in outcomes) else 0


def _parse(arguments: list[str]) -> tuple[list[str], dict[str, list[str]], str, bool]:
    varied: list[str] = []
    given: dict[str, list[str]] = {}
    device, as_json, rest = "cpu", False, list(arguments)
    while rest:
        text = rest.pop(0)
        key, equals, value = text.partition("=")
        if text == "--json":
            as_json = True
        elif key in ("--slot", "--device"):
            value = value if equals else (rest.pop(0) if rest else "")
            if key == "--slot":
                varied += value.split(",")
            elif value in ("cpu", "cuda"):
                device = value
            else:
                raise UserError(f"--device is cpu or cuda.\n{USAGE}")
        elif equals and not text.startswith("-"):
            given[key] = value.split(",")
        else:
            raise UserError(f"plugins matrix does not take '{text}'.\n{USAGE}")
    return varied, given, device, as_json
