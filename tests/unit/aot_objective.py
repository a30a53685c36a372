"""Compile the kernels of the KL objective for GPUs that are not there; run as a program.

    python aot_objective.py sm_90 C R T H K E dtype[+dtype of index keys]

Prints one JSON object per kernel, as aot_compile.py does for those of the attention. The index has
4 heads of 64.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from aot_compile import record, report

HEADS, WIDTH, TILES = 4, 64, 8


def launches_of(
    capability: int, c: int, r: int, t: int, h: int, k: int, e: int, dtype: torch.dtype,
    of_keys: torch.dtype
) -> list[Any]:  # fmt: skip
    from gsa_kernels.index_score import at_launch
    from gsa_kernels.indexer_loss import triton_launch
    from gsa_kernels.sparse_attention import triton_config

    triton_config.has_tma = lambda device: capability >= 90

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    tiles, docs = meta(TILES, dtype=torch.int64), meta(1, t, dtype=torch.int64)
    q, keys = meta(1, t, HEADS, WIDTH), meta(1, t // c, WIDTH, dtype=of_keys)
    if c > 1:
        keys = keys.float()  # means
    single = c == r == 1
    weight, bias = meta(1, t, HEADS), meta(HEADS, dtype=torch.float32)

    def objective() -> None:
        """One step: every candidate of a few tiles, then the selected blocks of all."""
        blocks = triton_launch.candidate_blocks(tiles, docs, 1, t, [c, r, 128, 64, 0, 1])
        mass = triton_launch.block_mass(
            meta(1, t, h, e), meta(1, t, k, e), tiles, docs, [c, r, 0, 1]
        )
        selected = meta(1, 1, -(-t // r), 2048 // c, dtype=torch.int32)
        for lists, numbers in ((blocks, tiles), (selected, None)):
            args = (q, keys, weight, bias, lists, numbers, r, WIDTH**-0.5, True)
            scores = at_launch.scores(*args)
            mass = torch.empty_like(scores)
            _, grad = triton_launch.kl_rows(scores, mass, True, 1e-6)
            at_launch.gradients(grad, *args, 0 if single and numbers is None else -1)

    return record(objective)


def main() -> None:
    capability = int(sys.argv[1].removeprefix("sm_"))
    sizes = [int(x) for x in sys.argv[2:8]]
    dtypes = [getattr(torch, name) for name in sys.argv[8].split("+")]
    report(launches_of(capability, *sizes, dtypes[0], dtypes[-1]), capability)


if __name__ == "__main__":
    main()
