"""Compile the launches of one selection for GPUs that are not there; run as a program.

    python aot_select.py sm_80,sm_90 C R T J I dtype[+dtype of keys] k score [docs]
        [pooling,pool,survivors] [entropy|variance: budgets by a rule]

Prints first the launches that one call makes, in order (kernels, and PyTorch's own operations that
launch something), then one JSON object per kernel as aot_compile does.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from aot_compile import record, report
from torch.utils._python_dispatch import TorchDispatchMode

SILENT = ("empty", "view", "slice", "unsqueeze", "select", "detach", "alias")


class Launching(TorchDispatchMode):
    """Names of the operations called that launch a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        if name.startswith("aten::") and name.removeprefix("aten::") not in SILENT:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def main() -> None:
    from gsa_kernels.index_score.api import HierarchicalFactors, IndexFactors
    from gsa_kernels.select import api, chunked
    from gsa_kernels.selection import SelectionSpec

    c, r, t, heads, width = (int(x) for x in sys.argv[2:7])
    dtypes = [getattr(torch, name) for name in sys.argv[7].split("+")]
    keys, block_score = int(sys.argv[8]), sys.argv[9]
    docs = torch.zeros(1, t, dtype=torch.long) if "docs" in sys.argv[10:] else None
    coarse = [word.split(",") for word in sys.argv[10:] if "," in word]
    kind: type[IndexFactors] = IndexFactors
    more: dict[str, Any] = {}
    for pooling, pool, survivors in coarse:
        kind, more = HierarchicalFactors, {"pool": int(pool), "survivors": int(survivors)}
        more["pooling"] = pooling
    factors = kind(
        torch.empty(1, t, heads, width, dtype=dtypes[0]),
        torch.empty(1, t, width, dtype=dtypes[-1]),
        torch.ones(1, t, heads, dtype=dtypes[0]),
        torch.zeros(heads),
        width**-0.5,
        block_score=block_score,
        **more,
    )
    spec = SelectionSpec(c, r, window=128, sinks=64)
    names = tuple(name for name in ("variance", "entropy") if name in sys.argv[10:])
    budget: Any = (lambda values: (keys * values[names[0]]).long()) if names else keys

    def call() -> None:
        width = spec.max_blocks(keys, t)
        rows = api._rows("triton", factors, spec, t, docs, names, width=width)
        with Launching() as seen:
            chunked.run(rows, factors, spec, budget, keys, t, docs, None, names)
        print(json.dumps(seen.names))

    launches = record(call)
    print(json.dumps([kernel.__name__ for kernel, _, _ in launches]))
    first = {kernel.__name__: (kernel, *rest) for kernel, *rest in reversed(launches)}
    last = {kernel.__name__: (kernel, *rest) for kernel, *rest in launches}
    different = [v for n, v in last.items() if v[1] is not first[n][1]]
    for target in sys.argv[1].split(","):
        report([*first.values(), *different], int(target.removeprefix("sm_")))


if __name__ == "__main__":
    main()
