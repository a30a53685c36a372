"""Attention backends side by side: dense, windowed, and sparse over one Selection.

    python experiments/backends/run.py --out DIR            one CUDA GPU, 8K and 32K tokens
    python experiments/backends/run.py --out DIR --device cpu --tiny

B = 1, 16 query heads, 4 key-value heads of 128, bfloat16; Selections of C = R = 64, k = 2048
keys, window 128, 64 sinks, chosen by random index factors; windows of 2048 keys. Each arm is the
component as a layer calls it, so `flex` includes making its mask; `flex kernel alone` does not.
Forward, and forward + backward: medians from CUDA events after warm-up, two sets of inputs in
turn. Each arm's output and gradients are compared with one arm of its group run in float32; an arm
that cannot run is recorded with its reason. Writes results.json and table.md into DIR; exits with
1 if an arm that ran differs.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gsa_kernels import Selection, SelectionSpec
from gsa_kernels.index_score.api import IndexFactors
from gsa_kernels.select.api import select
from gsa_kernels.sparse_attention.api import implementations
from gsa_platform.contracts import LayerDims, Sequence
from gsa_plugins import configs
from gsa_plugins.attention import sdpa, xformers_ops
from gsa_plugins.attention.dense import DenseAttention
from gsa_plugins.attention.flex import FlexSelectedAttention, attend_compiled
from gsa_plugins.attention.gsa import GatedSparseAttention
from gsa_plugins.attention.sliding_window import SlidingWindowAttention
from gsa_plugins.attention.xformers_dense import XformersAttention
from gsa_plugins.attention.xformers_sparse import XformersSparseAttention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
TENSORS = ("out", "dq", "dk", "dv")
# Relative error against float32: a few roundings of the inputs' precision.
ALLOWED = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


@dataclass(frozen=True)
class Size:
    """What is measured; counts are keys or queries."""

    lengths: tuple[int, ...] = (8192, 32768)
    heads: int = 16
    kv_heads: int = 4
    width: int = 128
    tile: int = 64  # C = R
    budget: int = 2048
    window: int = 128
    sinks: int = 64
    sliding: int = 2048


TINY = Size((256, 512), 4, 2, 16, 16, 128, 32, 16, 64)


@dataclass
class Arm:
    """One row of the results. Times in milliseconds; `reason` says why there are none."""

    group: str
    name: str
    length: int
    forward_ms: float | None = None
    forward_backward_ms: float | None = None
    peak_gb: float | None = None  # of forward + backward, inputs included; on a GPU
    errors: dict[str, float] = field(default_factory=dict)
    equal: bool | None = None
    reason: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens, in place of the usual")
    parser.add_argument("--only", default="", help="arms whose name contains this")
    parser.add_argument("--commit", default="", help="where there is no git repository to ask")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device: try --device cpu --tiny")
    size = TINY if args.tiny else Size()
    lengths = args.lengths or size.lengths
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[Arm] = []
    for length in lengths:
        torch.compiler.reset()  # else the second length is compiled for any length
        for group, (exact, arms) in groups(size, length, args.device).items():
            wanted = {n: a for n, a in arms.items() if args.only in n}
            rows += measure(group, exact, wanted, size, length, args.device, dtype)
            save(args.out, rows, size, args.device, dtype, args.commit)
    print((args.out / "table.md").read_text())
    return 1 if any(row.equal is False for row in rows) else 0


def groups(
    size: Size, length: int, device: str
) -> dict[str, tuple[Attend, dict[str, Callable[[], Attend]]]]:
    """By group: the arm that the others must equal, then makers of each arm by name."""
    dims = LayerDims(size.heads * size.width, size.heads, size.kv_heads, size.width, length)
    chosen = selection(size, length, device)

    def dense(backend: str) -> Attend:
        sdpa.refuse(backend, torch.device(device))
        layer = DenseAttention(configs.DenseAttentionConfig(backend=backend), dims)
        return _call(layer, None)

    def window(impl: str) -> Attend:
        config = configs.SlidingWindowConfig(window=size.sliding, impl=impl)
        return _call(SlidingWindowAttention(config, dims), None)

    def xformers(window: int) -> Attend:
        _require_xformers(device)
        layer = XformersAttention(configs.XformersConfig(window=window), dims)
        return _call(layer, None)

    def gsa(impl: str) -> Attend:
        if why := implementations(torch.device(device))[impl]:
            raise ValueError(why)
        config = configs.GsaAttentionConfig(key_block=size.tile, query_tile=size.tile, impl=impl)
        return _call(GatedSparseAttention(config, dims), chosen)

    def flex(block: int, alone: bool = False) -> Attend:
        config = configs.FlexConfig(key_block=size.tile, query_tile=size.tile, block=block)
        layer = FlexSelectedAttention(config, dims)
        if not alone:
            return _call(layer, chosen)
        if device == "cpu":
            raise ValueError("FlexAttention has no backward on a CPU")
        mask = chosen.to_block_mask(block, heads=size.heads)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return attend_compiled(q, k, v, mask, size.width**-0.5).transpose(1, 2)

        return attend

    def xformers_sparse() -> Attend:
        config = configs.XformersSparseConfig(key_block=size.tile, query_tile=size.tile)
        return _call(XformersSparseAttention(config, dims), chosen)

    backends = [b for b in sdpa.BACKENDS if b not in ("auto", "math")]
    return {
        "dense": (
            dense("efficient" if device == "cuda" else "flash"),
            {f"dense {b}": lambda b=b: dense(b) for b in backends}
            | {"xformers": lambda: xformers(0)},
        ),
        "sliding window": (
            window("chunked"),
            {f"sliding_window {i}": lambda i=i: window(i) for i in ("chunked", "flash")}
            | {"xformers window": lambda: xformers(size.sliding)},
        ),
        "selection": (
            gsa("eager"),
            {f"gsa {i}": lambda i=i: gsa(i) for i in ("eager", "triton")}
            | {f"flex cells {b}": lambda b=b: flex(b) for b in (128, 64)}
            | {f"flex kernel alone {b}": lambda b=b: flex(b, True) for b in (128, 64)}
            | {"xformers_sparse": xformers_sparse},
        ),
    }


def _call(layer: Any, chosen: Selection | None) -> Attend:
    return lambda q, k, v: layer(q, k, v, chosen, Sequence()).out_BTHE


def _require_xformers(device: str) -> None:
    if why := xformers_ops.reason(device):
        raise ValueError(why)


def selection(size: Size, length: int, device: str) -> Selection:
    """A choice by random index factors."""
    g = torch.Generator(device).manual_seed(0)
    shapes = ((1, length, 4, 32), (1, length, 32), (1, length, 4))
    q, k, w = (torch.randn(s, generator=g, device=device) for s in shapes)
    spec = SelectionSpec(size.tile, size.tile, size.window, size.sinks)
    factors = IndexFactors(q, k, w.sigmoid(), scale=32**-0.5)
    return select(factors, spec, size.budget, size.budget, length).selection


def inputs(size: Size, length: int, device: str, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    g = torch.Generator(device).manual_seed(seed)
    heads = (size.heads, size.kv_heads, size.kv_heads, size.heads)
    return [
        torch.randn(1, length, n, size.width, generator=g, device=device).to(dtype) for n in heads
    ]


def measure(
    group: str,
    exact: Attend,
    arms: dict[str, Callable[[], Attend]],
    size: Size,
    length: int,
    device: str,
    dtype: torch.dtype,
) -> list[Arm]:
    sets = [inputs(size, length, device, dtype, seed) for seed in (1, 2)]
    expected = results(exact, [x.float() for x in sets[0]]) if arms else {}
    rows = []
    for name, make in arms.items():
        row = Arm(group, name, length)
        rows.append(row)
        try:
            attend = make()
            row.errors = compare(results(attend, sets[0]), expected)
            row.equal = all(e <= ALLOWED[dtype] for e in row.errors.values())
            row.forward_ms = milliseconds(forward(attend, sets), device)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            row.forward_backward_ms = milliseconds(both(attend, sets), device)
            if device == "cuda":
                row.peak_gb = torch.cuda.max_memory_allocated() / 1e9
        except Exception as error:  # a backend that cannot run is a result, not the end
            row.reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
        if device == "cuda":
            torch.cuda.empty_cache()
        print(f"{length:>7} {name:<24} {describe(row)}", flush=True)
    return rows


def describe(row: Arm) -> str:
    if row.reason:
        return row.reason
    worst = max(row.errors.values())
    times = f"{row.forward_ms:9.3f} ms  {row.forward_backward_ms:9.3f} ms"
    return f"{times}  error {worst:.1e}{'' if row.equal else '  DIFFERS'}"


def results(attend: Attend, tensors: list[Tensor]) -> dict[str, Tensor]:
    """Output and gradients by name."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out = attend(*leaves)
    grads = torch.autograd.grad(out, leaves, tensors[3])
    return {n: x.detach() for n, x in zip(TENSORS, [out, *grads], strict=True)}


def compare(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of each tensor."""
    return {
        n: float((got[n].float() - e.float()).norm() / e.float().norm())
        for n, e in expected.items()
    }


def forward(attend: Attend, sets: list[list[Tensor]]) -> Callable[[int], None]:
    @torch.no_grad()
    def run(i: int) -> None:
        attend(*sets[i % len(sets)][:3])

    return run


def both(attend: Attend, sets: list[list[Tensor]]) -> Callable[[int], None]:
    leaves = [[x.detach().requires_grad_() for x in s[:3]] for s in sets]

    def run(i: int) -> None:
        i %= len(sets)
        torch.autograd.grad(attend(*leaves[i]), leaves[i], sets[i][3])

    return run


def milliseconds(run: Callable[[int], None], device: str) -> float:
    """Median of up to 20 runs in about 2 seconds, after warm-up."""
    for i in range(3 if device == "cuda" else 1):
        run(i)
    once = _timed(run, 0, device)
    repeats = int(min(20, max(3, 2000 / once)))
    return statistics.median(_timed(run, i, device) for i in range(repeats))


def _timed(run: Callable[[int], None], i: int, device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        run(i)
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run(i)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def save(
    out: Path, rows: list[Arm], size: Size, device: str, dtype: torch.dtype, commit: str
) -> None:
    """results.json and table.md; written after every group, so that a stop loses little."""
    result = {
        **environment(device, commit),
        "size": asdict(size),
        "dtype": str(dtype).removeprefix("torch."),
        "granularity": f"C={size.tile} keys, R={size.tile} queries",
        "allowed_error": ALLOWED[dtype],
        "arms": [asdict(row) for row in rows],
    }
    (out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        f"{result['device']}, driver {result['driver']}, torch {result['torch']}, triton "
        f"{result['triton']}, xformers {result['xformers']}, commit {result['commit']}.",
        f"{size.heads} heads, {size.kv_heads} key-value heads of {size.width}, "
        f"{result['dtype']}; selection of {result['granularity']}, k={size.budget}; sliding "
        f"window {size.sliding}. Milliseconds; error: largest of output and gradients.",
        "",
        "| tokens | group | arm | forward | forward + backward | peak GB | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row.length}", row.group, row.name]
        if row.reason:
            cells += [row.reason.replace("|", "/"), "", "", ""]
        else:
            worst = f"{max(row.errors.values()):.1e}{'' if row.equal else ' DIFFERS'}"
            peak = "" if row.peak_gb is None else f"{row.peak_gb:.2f}"
            cells += [f"{row.forward_ms:.3f}", f"{row.forward_backward_ms:.3f}", peak, worst]
        lines.append(f"| {' | '.join(cells)} |")
    (out / "table.md").write_text("\n".join(lines) + "\n")


def environment(device: str, commit: str) -> dict[str, Any]:
    """Machine, versions, commit and command."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "device": name,
        "driver": _output(query).partition("\n")[0] if device == "cuda" else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "xformers": _version("xformers"),
        "commit": commit or _output(["git", "rev-parse", "HEAD"]),
        "command": " ".join(["python", *sys.argv]),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
