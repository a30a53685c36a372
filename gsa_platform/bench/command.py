"""``bench NAME``: run one benchmark, print its table and write its report."""

from __future__ import annotations

import shlex
import sys
from typing import Any

from gsa_platform import registry
from gsa_platform.atomic import write_json
from gsa_platform.bench.benchmark import Benchmark, Progress, WrongResultError
from gsa_platform.bench.options import help_text, parse
from gsa_platform.errors import UserError
from gsa_platform.terminal import say

USAGE = "Usage: gsa-platform bench NAME [--option value ...]"


def run(arguments: list[str]) -> int:
    """Run a benchmark; returns 1 if a result is wrong. Raises UserError for a benchmark or an
    option that does not exist."""
    found = registry.get()
    names = found.names("benchmark")
    asked = {"--help", "-h"} & set(arguments)
    if not arguments or arguments[0].startswith("-"):
        rows = [f"  {n:<12} {found.component('benchmark', n).summary}" for n in names]
        text = "\n".join([USAGE, *rows, "Its options: gsa-platform bench NAME --help"])
        if not asked:
            raise UserError(text)
        print(text)
        return 0
    name, *rest = arguments
    component = found.component("benchmark", name)
    if asked:
        from gsa_platform.plugin_commands import field_comments

        comments = field_comments(component.config)
        print(help_text(component.config, f"bench {name}", component.summary, comments))
        return 0
    settings = parse(component.config, rest, f"bench {name}")
    return measure(found.target("benchmark", name), name, settings, rest)


def measure(kind: type[Benchmark], name: str, settings: Any, arguments: list[str]) -> int:
    """Build a benchmark and run it; its report says how it was called."""
    try:
        benchmark = kind(settings)
    except ValueError as error:
        raise UserError(f"bench {name}: {error}") from error
    out = settings.out or f"bench-{name}.json"
    command = shlex.join(["python", "-m", "gsa_platform", "bench", name, *arguments])

    def save(report: dict[str, Any]) -> None:
        write_json(out, report | {"command": command})

    try:
        report = benchmark.run(Progress(say, save))
    except WrongResultError as error:
        print(f"error: {error}\n  Nothing was timed.", file=sys.stderr, flush=True)
        return 1
    print(benchmark.render(report))
    save(report)
    print(f"written {out}")
    return 0
