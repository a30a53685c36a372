"""The first-party benchmarks from a folder of sources, where nothing but PyTorch is installed.

python -m gsa_plugins.bench attention ...   as gsa-platform bench attention ...
"""

import importlib
import sys

from gsa_platform.bench.command import measure
from gsa_platform.bench.options import parse
from gsa_platform.errors import UserError, unknown

from .records import gsa_register_benchmark


def main(arguments: list[str]) -> int:
    """Run one benchmark; exit codes as those of gsa-platform."""
    records = {record.name: record for record in gsa_register_benchmark()}
    try:
        name, *rest = arguments or [""]
        if name not in records:
            raise UserError(unknown("benchmark", name, records))
        settings = parse(records[name].config, rest, f"bench {name}")
        module, _, attribute = records[name].target.partition(":")
        return measure(getattr(importlib.import_module(module), attribute), name, settings, rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
