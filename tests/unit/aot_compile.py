"""Compile the launches of an operation for GPUs that are not there; run as a program.

    python aot_compile.py sm_90 C R T H K E dtype

Prints one JSON object per kernel: registers, spilled bytes and shared memory. The launch code runs
on meta tensors with every launch recorded instead of made, so what is compiled is what would run.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def record(call: Callable[[], Any]) -> list[tuple[JITFunction, dict[str, Any], dict[str, Any]]]:
    """(kernel, arguments by name, options) of every launch that `call` makes."""
    launches = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = dict(zip(self.arg_names, args))
        options = {k: v for k, v in kwargs.items() if k not in self.arg_names}
        launches.append(
            (self, named | {k: kwargs[k] for k in kwargs if k in self.arg_names}, options)
        )

    original = JITFunction.run
    JITFunction.run = run  # type: ignore[method-assign, assignment]
    try:
        call()
    finally:
        JITFunction.run = original  # type: ignore[method-assign]
    return launches


def compiled(
    kernel: JITFunction, arguments: dict[str, Any], options: dict[str, Any], capability: int
) -> Any:
    constexprs = {kernel.arg_names[i] for i in kernel.constexprs}
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if name in constexprs:
            signature[name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            kind = TYPES[value.base.dtype].removeprefix("*")
            signature[name] = f"tensordesc<{kind}{list(value.block_shape)}>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not kernel.params[place].do_not_specialize:  # as at run time
            signature[name], constants[(place,)] = "constexpr", value
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not kernel.params[place].do_not_specialize:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(binary: bytes) -> dict[str, int]:
    """Registers per thread and bytes of local memory (spills, stack) of a cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(found["REG"]), "local": int(found["STACK"]) + int(found["LOCAL"])}


def launches_of(
    capability: int, c: int, r: int, t: int, h: int, k: int, e: int, dtype: torch.dtype
) -> list[Any]:
    from gsa_kernels.selection import Selection, SelectionSpec
    from gsa_kernels.sparse_attention import triton_config, triton_decode, triton_launch

    triton_config.has_tma = lambda device: capability >= 90
    triton_config.has_tensor_memory = lambda device: capability >= 100
    spec = SelectionSpec(c, r, window=128, sinks=64)
    tiles, slots = -(-t // r), spec.max_blocks(2048, t)
    blocks = torch.zeros(1, 1, tiles, slots, dtype=torch.int32, device="meta")
    selection = Selection(spec, blocks, t, t)
    q = torch.empty(1, t, h, e, dtype=dtype, device="meta")
    kv = torch.empty(1, t, k, e, dtype=dtype, device="meta")
    lse = torch.empty(1, h, t, device="meta")
    residual = torch.empty(q.shape, dtype=torch.int8, device="meta")

    def calls() -> None:
        triton_launch.forward(q, kv, kv, selection, None, None, 0.1, False)
        triton_launch.forward(q, kv, kv, selection, None, None, 0.1, True, q, True)
        triton_launch.backward(
            q, kv, kv, q, lse, q, None, selection, None, None, 0.1, False, q, residual
        )
        triton_decode.decode(q[:, :1], kv, kv, selection.rows(t - 1, t), None, None, None, 0.1)
        if c == r == 1:
            bias = torch.zeros(blocks.shape, device="meta")
            triton_launch.backward(
                q, kv, kv, q, lse, q, None, selection, bias, None, 0.1, True, None
            )

    return record(calls)


def report(launches: list[Any], capability: int) -> None:
    """Print what each launch takes of the GPU, one JSON object a line."""
    seen = set()
    for kernel, arguments, options in launches:
        built = compiled(kernel, arguments, options, capability)
        if built.hash in seen:
            continue
        seen.add(built.hash)
        row = {"kernel": kernel.__name__, "shared": built.metadata.shared, **options}
        print(json.dumps(row | resources(built.asm["cubin"])), flush=True)


def main() -> None:
    capability = int(sys.argv[1].removeprefix("sm_"))
    sizes = [int(x) for x in sys.argv[2:8]]
    report(launches_of(capability, *sizes, getattr(torch, sys.argv[8])), capability)


if __name__ == "__main__":
    main()
