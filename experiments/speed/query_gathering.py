"""Query gathering beside the union tiles, for queries that choose their own blocks (R = 1).

    python experiments/speed/query_gathering.py --seq-len 131072 --out query_gathering.json

Inputs as `gsa-platform bench attention --mode block --inputs smooth` makes them. Results are
checked against the float64 reference at 500 tokens, and against the union tiles at the full
length. Times are of the attention alone, the selection is given: `whole`, then its parts (lists,
near keys, gathering, merging) one by one; `passes` is gathering and merging as `whole` makes them,
`graph` a CUDA graph of that. A line is one Tuning; query_gathering_kernels.py has the design.
`paired_groups` in the JSON is another design, of paired_groups.py.

Predicted for T = 131072, H = 16, K = 4, E = 128, C = 64, k = 2048, so 29 blocks chosen by each
query: 3.8 M choices, 60.8 M rows of (query, head, block). Counts are those of smooth inputs.

- Union tiles: 17.6 ms measured, for about 106 block visits by each group of 16 queries and
  key-value head, 101 of them chosen: 114 GB read at 6.5 TB/s, 7.3 TFLOP at 413 TFLOP/s. A visit by
  four heads takes 20.3 ns, however many of the 16 queries chose the block; a third of the visited
  blocks was chosen by one.
- A gathered row reads its query (256 B) and writes its part (256 B), which the merge reads once
  more, and shares the block (32 KB) with its item's other rows. All far (united = 17), chunks of
  2048: lists of 60 queries, 1.14 times the pairs computed.
    gathering   40 GB of L2 at 5.5 TB/s: 7.2 ms; 2.3 TFLOP at 450 TFLOP/s: 5.0 ms, beneath it
    waiting     256 launches of 28 us whose programs begin, end and wait for blocks apart: 1.2 ms
    merging     15.8 GB of parts from L2, 1.1 GB of results from memory: 3.2 ms
    near keys   window and sinks, 5 visits: 1.0 ms; lists: 0.7 ms
  In all 13 ms; 3.0 ns a choice, so that a visit is worth seven of them.
- So blocks chosen by 8 or more of 16 stay with the union tiles: 20 visits of 101 that hold half of
  the choices. 30 M rows remain, lists of 31 queries, 1.27 times the pairs. Near keys 4.1 ms,
  gathering 4.2, waiting 1.2, merging 1.8, lists 0.7: 12 ms.
- The parts of a pass (one chunk, one key-value head) are then 31 MB in use and stay in the L2
  (50 MB) if anything does; the blocks of a pass are 24 to 50 MB more. If not, 7.8 GB of parts (16
  all far) are written to memory and read again, and 8 GB of blocks read: 3 to 5 ms each, partly
  under the L2's time. That makes 14 to 15 ms, all far 17. Larger chunks have longer lists
  but certainly pay this.
- Random inputs: nothing is near, a chunk's lists are T k / (C S) = 29 queries on average and 1.25
  times the pairs are computed: 14 to 17 ms, where unions are 11.4 times a query's list.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import paired_groups
import torch
from query_gathering_kernels import Lists, Tuning, attend, launch, make_lists, near_keys, passes
from torch import Tensor
from triton.runtime.errors import TritonError

from gsa_kernels.bench.case import Case, Shape, make_case
from gsa_kernels.bench.dense import dense_times
from gsa_kernels.bench.timing import environment, host_milliseconds, milliseconds, peak_bytes
from gsa_kernels.bench.work import work
from gsa_kernels.selection import Selection, SelectionSpec
from gsa_kernels.sparse_attention import sparse_attention

TUNINGS = {
    "default": Tuning(),
    "all far": Tuning(united=17),
    "near from 6": Tuning(united=6),
    "near from 11": Tuning(united=11),
    "chunks of 1024": Tuning(chunk=1024, longest=64),
    "chunks of 1024, two lanes": Tuning(chunk=1024, longest=64, lanes=2),
    "chunks of 2048, two lanes": Tuning(lanes=2),
    "chunks of 2048, two heads": Tuning(together=2),
    "chunks of 4096": Tuning(chunk=4096),
    "chunks of 4096, all heads": Tuning(chunk=4096, together=0),
    "all far, chunks of 4096, all heads": Tuning(chunk=4096, together=0, united=17),
    "items of 64": Tuning(longest=64),
    "merging 16 rows": Tuning(merged=16),
    "128 rows, 8 warps": Tuning(rows=128, warps=8, registers=255, resident=1),
    "blocks streamed": Tuning(streamed=True),
    "2 stages": Tuning(stages=2),
    "1 stage, 4 programs": Tuning(stages=1, registers=128, resident=4),
}


def union_tiles(case: Case, v: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    result = sparse_attention(case.q, case.k, v, selection, need_lse=True, impl=case.impl)
    assert result.lse_BTH is not None
    return result.out_BTHE, result.lse_BTH


def differences(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Relative error of out, largest error of lse."""
    out, lse = (x.double() for x in got)
    return {
        "out": float((out - want[0].double()).norm() / want[0].double().norm()),
        "lse": float((lse - want[1].double()).abs().max()),
    }


def verify(shape: Shape) -> dict[str, float]:
    """Error over that of the low-precision reference, at 500 tokens; AssertionError above 2."""
    spec = replace(shape.spec, window=32, sinks=16)
    length = min(500, shape.seq_len)
    case = make_case(replace(shape, seq_len=length, k=length // 2, spec=spec, memory=16))
    selection = case.choose()

    def reference(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        q, k, v = (x.to(dtype) for x in (case.q, case.k, case.v))
        found = sparse_attention(q, k, v, selection, need_lse=True, impl="reference")
        assert found.lse_BTH is not None
        return found.out_BTHE, found.lse_BTH

    exact, low = reference(torch.float64), reference(case.q.dtype)
    ratios = {}
    for united in (17, 8):
        tuning = Tuning(chunk=200, united=united, longest=48)
        got = attend(case.q, case.k, case.v, selection, tuning, impl=case.impl)
        for name, mine, other, value in zip(("out", "lse"), got, low, exact):
            error, allowed = ((x.double() - value).norm() for x in (mine, other))
            ratio = float(error / (allowed + 4 * torch.finfo(torch.float32).eps * value.norm()))
            assert ratio <= 2, f"{name} is wrong by {ratio:.1f} x the low-precision error"
            ratios[f"{name}_near_from_{united}"] = round(ratio, 3)
    return ratios


def counts(lists: Lists, tuning: Tuning, heads: int, kv_heads: int) -> dict[str, float]:
    """Far choices of a query; queries of an item; rows computed over rows that exist."""
    far = float((lists.far >= 0).sum())
    there = torch.arange(lists.items.shape[2], device=lists.items.device) < lists.used[..., None]
    length = (lists.items[..., 2] - lists.items[..., 1])[there]
    each = tuning.rows // (heads // kv_heads)
    queries = lists.near.n_queries * lists.near.blocks_BHQN.shape[0] * lists.far.shape[1]
    computed = float(((length + each - 1) // each * each).sum())
    return {
        "far_choices": far / queries,
        "queries_of_an_item": far / max(1, len(length)),
        "rows_computed": computed / max(1.0, far),
    }


def graph_ms(call: Callable[[], Any], device: torch.device, budget_s: float) -> float | None:
    """Milliseconds of a CUDA graph of the call, which the host cannot slow; None without one."""
    if device.type != "cuda":
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        print(f"  no graph: {str(error).splitlines()[0]}", flush=True)
        return None
    return milliseconds(graph.replay, device, budget_s)


def record(
    case: Case, v: Tensor, selection: Selection, tuning: Tuning, budget_s: float
) -> dict[str, Any]:
    """One tuning: counts, and times of the whole and of its parts."""
    q, k, device = case.q, case.k, case.q.device

    def whole() -> tuple[Tensor, Tensor]:
        return attend(q, k, v, selection, tuning, impl=case.impl)

    row: dict[str, Any] = {"tuning": asdict(tuning)}
    lists = make_lists(selection, tuning)
    row |= counts(lists, tuning, q.shape[2], k.shape[2])
    out, lse = near_keys(q, k, v, lists.near, None, case.impl)
    found = passes(q, k, v, out, lse, lists, tuning)

    def each(place: int) -> None:
        for pair in found:
            pair[place]()

    parts: dict[str, Callable[[], Any]] = {
        "whole": whole,
        "lists": lambda: make_lists(selection, tuning),
        "near": lambda: near_keys(q, k, v, lists.near, None, case.impl),
        "gather": partial(each, 0),
        "merge": partial(each, 1),
        "passes": lambda: launch(found, device, tuning.lanes),
    }
    for name, call in parts.items():
        row[f"{name}_ms"] = milliseconds(call, device, budget_s)
    row["passes_graph_ms"] = graph_ms(parts["passes"], device, budget_s)
    row["host_ms"] = host_milliseconds(whole, device)
    row["extra_bytes"] = peak_bytes(whole, device)
    return row


def paired_record(
    case: Case, v: Tensor, selection: Selection, want: tuple[Tensor, Tensor], budget_s: float
) -> dict[str, Any]:
    """Paired groups: the difference; times of the whole, of its unions, of window and sinks."""
    device, near = case.q.device, replace(selection, blocks_BHQN=selection.blocks_BHQN[..., :0])

    def whole(stages: int = 2) -> tuple[Tensor, Tensor]:
        tensors = (case.q, case.k, v, selection)
        return paired_groups.attend(*tensors, impl=case.impl, stages=stages)

    row: dict[str, Any] = {"difference": differences(whole(), want)}
    for stages in (2, 3):
        row[f"whole_{stages}_stages_ms"] = milliseconds(partial(whole, stages), device, budget_s)
    row["unions_ms"] = milliseconds(lambda: paired_groups.unite(selection), device, budget_s)
    row["near_ms"] = milliseconds(lambda: union_tiles(case, v, near), device, budget_s)
    visits = paired_groups.unite(selection)[2].float().mean()
    return row | {"visits": float(visits), "extra_bytes": peak_bytes(whole, device)}


COLUMNS = {
    "whole": "whole_ms",
    "lists": "lists_ms",
    "near": "near_ms",
    "gather": "gather_ms",
    "merge": "merge_ms",
    "passes": "passes_ms",
    "graph": "passes_graph_ms",
    "host": "host_ms",
    "far": "far_choices",
    "item": "queries_of_an_item",
    "computed": "rows_computed",
}


def line(name: str, row: dict[str, Any]) -> str:
    numbers = [row[key] for key in COLUMNS.values()]
    cells = "".join(f"{'-' if x is None else format(x, '.2f'):>9}" for x in numbers)
    error = row["difference"]
    return f"{name:36}{cells}  {error['out']:.1e} {error['lse']:.1e}"


def main() -> None:
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path)
    p.add_argument("--seq-len", type=int, default=131072 if cuda else 256)
    p.add_argument("--inputs", choices=("smooth", "random"), default="smooth")
    p.add_argument("--memory", type=int, default=256, help="positions, as of the benchmark")
    p.add_argument("--heads", type=int, default=16 if cuda else 4)
    p.add_argument("--kv-heads", type=int, default=4 if cuda else 2)
    p.add_argument("--head-dim", type=int, default=128 if cuda else 32)
    p.add_argument("--k", type=int, default=2048 if cuda else 128)
    p.add_argument("--key-block", type=int, default=64 if cuda else 16)
    p.add_argument("--tunings", nargs="+", choices=list(TUNINGS), default=list(TUNINGS))
    p.add_argument("--seconds", type=float, default=0.15 if cuda else 0.0, help="for each number")
    args = p.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    torch.manual_seed(0)
    window, sinks = (128, 64) if args.k > 512 else (32, 16)
    shape = Shape(
        "block", SelectionSpec(args.key_block, 1, window, sinks), args.seq_len, args.heads,
        args.kv_heads, args.head_dim, args.k, device, torch.bfloat16 if cuda else torch.float32,
        inputs=args.inputs, memory=args.memory, impl="triton" if cuda else "eager",
    )  # fmt: skip
    report: dict[str, Any] = environment(device) | shape.fields()
    report["command"] = " ".join(["python", *sys.argv])
    with torch.no_grad():
        report["error_over_low_precision"] = verify(shape)
        case = make_case(shape)
        selection, v = case.choose(), case.gated_values
        want = union_tiles(case, v, selection)
        report["inflation"] = work(selection, shape.heads, shape.kv_heads).inflation
        found, refused = dense_times(
            [(case.q, case.k, v)], ["cudnn" if cuda else "flash"], False, budget_s=args.seconds
        )
        report["dense_ms"], report["dense_refused"] = found, refused
        report["union_tiles_ms"] = milliseconds(
            lambda: union_tiles(case, v, selection), device, args.seconds
        )
        print(json.dumps(report), flush=True)
        print(f"{'':36}" + "".join(f"{name:>9}" for name in COLUMNS) + "  differences")
        report["records"] = []
        for name in args.tunings:
            row: dict[str, Any] = {"name": name}
            report["records"].append(row)
            try:
                got = attend(case.q, case.k, v, selection, TUNINGS[name], impl=case.impl)
                row["difference"] = differences(got, want)
                row |= record(case, v, selection, TUNINGS[name], args.seconds)
            except (RuntimeError, TritonError) as error:  # the others may fit
                row["error"] = str(error)
                print(f"{name:36}{str(error).splitlines()[0]}", flush=True)
            else:
                print(line(name, row), flush=True)
            if args.out:
                args.out.write_text(json.dumps(report, indent=1) + "\n")
        again = milliseconds(lambda: union_tiles(case, v, selection), device, args.seconds)
        report["union_tiles_again_ms"] = again
        print(f"union tiles {report['union_tiles_ms']:.2f} ms, at the end {again:.2f}")
        report["paired_groups"] = paired_record(case, v, selection, want, args.seconds)
        print(json.dumps(report["paired_groups"]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
