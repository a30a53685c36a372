"""`token` mode's choice alone: by lists beside the path that writes all scores.

    python experiments/speed/token_selection.py --seq-len 32768 131072 --out token_selection.json

Kinds of keys: `random`; those that mislead a sample, so that rows are chosen again (`again`: the
share of rows): `equal`, `few values`, `saturated`, `sorted`, `frequent` (few keys make most of the
text). `equal_choice`: both paths chose the same. `rule_ms`: the lists with budgets of k / 2 to k
that follow the statistic named; `statistics_ms`: those of the last 8192 queries. `alone_differs`:
statistics of single rows that are not those of the same rows among others, to the bit: 0 or a bug.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gsa_kernels.bench.timing import environment, milliseconds
from gsa_kernels.index_score.api import IndexFactors
from gsa_kernels.select import chunked, filter_launch, kernels, ops, select
from gsa_kernels.selection import SelectionSpec

SPEC = SelectionSpec(1, 1, window=128, sinks=64)
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda k: k,
    "equal": lambda k: k[:, :1].expand_as(k),
    "few values": lambda k: k[:, torch.arange(k.shape[1], device=k.device) % 3],
    "saturated": lambda k: k.sign() * 1000,
    "sorted": lambda k: k[:, :1] * torch.linspace(0, 3, k.shape[1], device=k.device)[:, None],
    "frequent": lambda k: k[:, (torch.rand(k.shape[1], device=k.device) ** 4 * 256).long()],
}
RULES = ("count", "variance", "entropy")


def factors_of(tokens: int, kind: str, args: argparse.Namespace) -> IndexFactors:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    q, k = draw(1, tokens, args.heads, args.width), draw(1, tokens, args.width)
    weight = draw(1, tokens, args.heads).sigmoid()
    bias = torch.zeros(args.heads, device=device)
    k = KINDS[kind](k).to(dtype).contiguous()
    return IndexFactors(q.to(dtype), k, weight.to(dtype), bias, args.width**-0.5)


def chosen(factors: IndexFactors, k: int, lists: bool) -> Tensor:
    """[B, H, T, N]; lists: not from all scores, written."""
    tokens = factors.n_queries
    width = SPEC.max_blocks(k, tokens) if lists else 0
    rows = kernels.FactorRows(factors, SPEC, None, None, width)
    assert (rows.plan is not None) == lists, "rows of this length are not chosen from lists"
    found = chunked.run(rows, factors, SPEC, k, k, tokens, None, None, ())
    return found.selection.blocks_BHQN


class Again:
    """Counts the rows that are chosen again while it is open."""

    def __enter__(self) -> Again:
        self.rows, self.run = 0, filter_launch.run

        def watched(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
            self.run(kernel, grid, *args, **constants)
            if kernel is filter_launch.pick_kernel:
                self.rows += int(args[6].sum())

        filter_launch.run = watched  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        filter_launch.run = self.run


def kind_record(tokens: int, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    factors, device = factors_of(tokens, kind, args), torch.device(args.device)
    with Again() as again:
        lists = chosen(factors, args.k, True)
    return {
        "tokens": tokens,
        "kind": kind,
        "equal_choice": torch.equal(lists, chosen(factors, args.k, False)),
        "again": again.rows / lists[..., 0].numel(),
        "lists_ms": milliseconds(lambda: chosen(factors, args.k, True), device, args.seconds),
        "written_ms": milliseconds(lambda: chosen(factors, args.k, False), device, args.seconds),
    }


def statistics(factors: IndexFactors, first: int, stop: int, entropy: bool) -> Tensor:
    """[4 or 5, 1, 1, rows] of the queries first .. stop - 1."""
    part = slice(first, stop)
    return ops.key_statistics(
        factors.q_BTJI[:, part], factors.k_BSI[:, :stop], factors.weight_BTJ[:, part],
        factors.bias_J, None, [1, SPEC.window, SPEC.sinks, first],
        [first, stop, stop - SPEC.window], float(factors.scale), True, 1, entropy,
    )  # fmt: skip


def rule_record(tokens: int, name: str, args: argparse.Namespace) -> dict[str, Any]:
    factors, device = factors_of(tokens, "random", args), torch.device(args.device)

    def rule(found: dict[str, Tensor]) -> Tensor:
        return (args.k // 2 + found["count"] % (args.k // 2)).long()

    def choose(impl: str = "triton") -> Tensor:
        names = () if name == "count" else (name,)
        found = select(factors, SPEC, rule, args.k, tokens, statistics=names, impl=impl)
        return found.selection.blocks_BHQN

    entropy, first = name == "entropy", max(0, tokens - 8192)
    some = range(max(first, tokens - args.alone), tokens)
    among = statistics(factors, first, tokens, entropy)[..., some[0] - first :]
    alone = torch.cat([statistics(factors, t, t + 1, entropy) for t in some], -1)
    return {
        "tokens": tokens,
        "rule": name,
        "rule_ms": milliseconds(choose, device, args.seconds),
        "statistics_ms": milliseconds(
            lambda: statistics(factors, first, tokens, entropy), device, args.seconds
        ),
        "alone_differs": int((among != alone).sum()),
    }


def main() -> None:
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path)
    p.add_argument("--device", default="cuda" if cuda else "cpu")
    p.add_argument("--dtype", default="bfloat16" if cuda else "float16")
    p.add_argument("--seq-len", type=int, nargs="+", default=[32768, 131072])
    p.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    p.add_argument("--rules", nargs="*", choices=RULES, default=list(RULES))
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--k", type=int, default=2048)
    p.add_argument("--alone", type=int, default=64, help="rows whose statistics are taken alone")
    p.add_argument("--seconds", type=float, default=0.3, help="for each number")
    args = p.parse_args()
    torch.manual_seed(0)
    report: dict[str, Any] = environment(torch.device(args.device))
    report["command"] = " ".join(["python", *sys.argv])
    report["records"] = []
    jobs = [(kind_record, n, kind) for n in args.seq_len for kind in args.kinds]
    jobs += [(rule_record, n, rule) for n in args.seq_len for rule in args.rules]
    for record, tokens, name in jobs:
        report["records"].append(record(tokens, name, args))
        print(json.dumps(report["records"][-1]), flush=True)
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
