"""Registers, spills and shared memory of both forwards of block mode, compiled without a GPU.

    python experiments/speed/compile_designs.py sm_90

At the size that query_gathering.py times, with and without documents; one JSON object per kernel,
for the Triton installed.
"""

import sys
from functools import partial
from pathlib import Path

import torch

from gsa_kernels.selection import Selection, SelectionSpec
from gsa_kernels.sparse_attention import triton_config, triton_launch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "unit"))
import aot_compile


def launches(tokens: int = 131072, documents: bool = False) -> None:
    spec = SelectionSpec(64, 1, window=128, sinks=64)
    blocks = torch.zeros(
        1, 1, tokens, spec.max_blocks(2048, tokens), dtype=torch.int32, device="meta"
    )
    docs = torch.zeros(1, tokens, dtype=torch.int32, device="meta") if documents else None
    selection = Selection(spec, blocks, tokens, tokens, 0, docs)
    q, k = (
        torch.empty(1, tokens, heads, 128, dtype=torch.bfloat16, device="meta")
        for heads in (16, 4)
    )
    for need_mass in (False, True):
        triton_launch.forward(q, k, k, selection, None, docs, 128**-0.5, need_mass)


if __name__ == "__main__":
    capability = int(sys.argv[1].removeprefix("sm_"))
    triton_config.has_tma = lambda device: capability >= 90
    for documents in (False, True):
        aot_compile.report(aot_compile.record(partial(launches, documents=documents)), capability)
