"""Backends of sliding-window attention side by side: output, gradients, time, memory.

    python experiments/backends/run.py --out DIR            one CUDA GPU, 8K and 32K tokens
    python experiments/backends/run.py --out DIR --device cpu --tiny

B = 1, 16 query heads, 4 key-value heads of 128, bfloat16; windows of 2048 keys. Each arm is the
component as a layer calls it. Each arm's output and gradients are compared with the chunked one in
float32; an arm that cannot run is recorded with its reason. Writes results.json and table.md into
DIR; exits with 1 if an arm that ran differs.

Dense attention and attention over a Selection by other packages: `gsa-platform bench attention
--dense ... --beside ...`.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gsa_kernels.bench.timing import environment, milliseconds, peak_bytes, version
from gsa_platform.contracts import LayerDims, Sequence
from gsa_plugins import configs
from gsa_plugins.attention import xformers_ops
from gsa_plugins.attention.sliding_window import SlidingWindowAttention
from gsa_plugins.attention.xformers_dense import XformersAttention

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
    window: int = 2048


TINY = Size((256, 512), 4, 2, 16, 64)


@dataclass
class Arm:
    """One row of the results. Times in milliseconds; `reason` says why there are none."""

    name: str
    length: int
    forward_ms: float | None = None
    forward_backward_ms: float | None = None
    extra_bytes: int | None = None  # of forward + backward; on a GPU
    errors: dict[str, float] = field(default_factory=dict)
    equal: bool | None = None
    reason: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--commit", default="", help="where there is no git repository to ask")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device: try --device cpu --tiny")
    size, device = TINY if args.tiny else Size(), torch.device(args.device)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    result: dict[str, Any] = dict(environment(device)) | {"xformers": version("xformers")}
    result |= {"command": shlex.join(["python", *sys.argv]), "size": asdict(size)}
    result["commit"] = args.commit or result["commit"]
    rows = [row for length in size.lengths for row in measure(size, length, device, dtype)]
    args.out.mkdir(parents=True, exist_ok=True)
    result["arms"] = [asdict(row) for row in rows]
    (args.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "table.md").write_text(table(result, rows))
    print((args.out / "table.md").read_text())
    return 1 if any(row.equal is False for row in rows) else 0


def arms(size: Size, dims: LayerDims, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Makers of each arm by name; the first is the one that the others must equal."""

    def window(impl: str) -> Any:
        config = configs.SlidingWindowConfig(window=size.window, impl=impl)
        return SlidingWindowAttention(config, dims)

    def xformers() -> Any:
        if why := xformers_ops.reason(device.type):
            raise ValueError(why)
        return XformersAttention(configs.XformersConfig(window=size.window), dims)

    return {
        "sliding_window chunked": lambda: window("chunked"),
        "sliding_window flash": lambda: window("flash"),
        "xformers window": xformers,
    }


def measure(size: Size, length: int, device: torch.device, dtype: torch.dtype) -> list[Arm]:
    dims = LayerDims(size.heads * size.width, size.heads, size.kv_heads, size.width, length)
    g = torch.Generator(device).manual_seed(1)
    heads = (size.heads, size.kv_heads, size.kv_heads, size.heads)
    inputs = [
        torch.randn(1, length, n, size.width, generator=g, device=device).to(dtype) for n in heads
    ]
    makers, rows = arms(size, dims, device), []
    exact = results(next(iter(makers.values()))(), [x.float() for x in inputs])
    for name, make in makers.items():
        row = Arm(name, length)
        rows.append(row)
        try:
            layer = make()
            got = results(layer, inputs)
            row.errors = {
                n: float((got[n].float() - e).norm() / e.norm()) for n, e in exact.items()
            }
            row.equal = all(e <= ALLOWED[dtype] for e in row.errors.values())
            with torch.no_grad():
                row.forward_ms = milliseconds(
                    lambda layer=layer: layer(*inputs[:3], None, Sequence()), device
                )
            row.forward_backward_ms = milliseconds(
                lambda layer=layer: results(layer, inputs), device
            )
            row.extra_bytes = peak_bytes(lambda layer=layer: results(layer, inputs), device)
        except Exception as error:  # a backend that cannot run is a result, not the end
            row.reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
        print(f"{length:>7} {name:<24} {row.reason or row.forward_backward_ms}", flush=True)
    return rows


def results(layer: Any, tensors: list[Tensor]) -> dict[str, Tensor]:
    """Output and gradients by name."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    with torch.enable_grad():
        out = layer(*leaves, None, Sequence()).out_BTHE
        grads = torch.autograd.grad(out, leaves, tensors[3])
    return {n: x.detach() for n, x in zip(TENSORS, [out, *grads], strict=True)}


def table(result: dict[str, Any], rows: list[Arm]) -> str:
    size = result["size"]
    lines = [
        f"{result['device']}, driver {result['driver']}, torch {result['torch']}, triton "
        f"{result['triton']}, xformers {result['xformers']}, commit {result['commit']}.",
        f"{size['heads']} heads, {size['kv_heads']} key-value heads of {size['width']}; window "
        f"{size['window']}. Milliseconds; error: largest of output and gradients.",
        "",
        "| tokens | arm | forward | forward + backward | extra MB | error |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row.length}", row.name]
        if row.reason:
            cells += [row.reason.replace("|", "/"), "", "", ""]
        else:
            worst = f"{max(row.errors.values()):.1e}{'' if row.equal else ' DIFFERS'}"
            memory = f"{(row.extra_bytes or 0) / 1e6:.0f}"
            cells += [f"{row.forward_ms:.3f}", f"{row.forward_backward_ms:.3f}", memory, worst]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
