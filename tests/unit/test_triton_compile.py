"""The launches of sparse attention compile for GPUs that CI lacks, within their limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448}  # bytes a program may have
SHAPES = {  # C, R, T, H, K, E, dtype
    "tile": "64 64 131072 16 4 128 bfloat16",
    "tile_16": "64 16 131072 16 4 128 bfloat16",
    "block": "64 1 32768 4 1 128 bfloat16",
    "token": "1 1 131072 16 4 128 bfloat16",
    "token_in_tile": "1 16 8192 16 4 128 bfloat16",
    "base": "64 64 131072 12 4 64 bfloat16",
}


CASES = [(shape, target) for shape in ("tile", "block") for target in SHARED]
CASES += [(shape, "sm_90") for shape in SHAPES if shape not in ("tile", "block")]
# Bytes of local memory, of kernels that take more than two words: those are no spilled tile.
LOCAL = {
    "forward_kernel": 16,  # sm_100, Triton 3.6, all outside the loops: two programs fit so
    "dq_kernel": 16,  # single keys, sm_90, Triton 3.9, outside the loops; 3.6 nothing
    "owned_kernel": 32,  # with a bias, outside the loops
    # sm_90, Triton 3.9: 16 outside the loops, and with the mass of each choice what a step needs
    # again; 3.6 nothing.
    "gather_kernel": 64,
}
# Triton 3.9 keeps descriptors of q there (256 rows); 3.6 nothing.
DESCRIPTORS = 232
GATHERING = {"split_kernel", "pair_kernel", "items_kernel", "places_kernel"}
GATHERING |= {"gather_kernel", "combine_kernel"}


COARSE = ["running_kernel", "score_kernel", "select_kernel", "survivor_kernel", "select_kernel"]
LISTS = ["score_kernel", "threshold_kernel", "filter_kernel", "pick_kernel"]
LISTS += ["digit_kernel"] * 5 + ["write_kernel"]
# targets, C, R, T, J, I, dtype, k, score, docs, coarse scores -> launches of one call
SELECTIONS = {
    "sm_80,sm_90,sm_100 1 1 4096 4 64 bfloat16 2048 mean mean,256,16": COARSE,
    "sm_90 64 64 131072 4 64 bfloat16+float32 2048 max docs max,256,16": COARSE,
    "sm_80,sm_90,sm_100 64 64 131072 4 64 bfloat16 2048 mean": [
        "pool_kernel", "score_kernel", "select_kernel",
    ],
    "sm_80,sm_90,sm_100 1 1 6000 4 64 bfloat16 2048 mean": [
        "score_kernel", "select_kernel", *LISTS,
    ],
    "sm_90,sm_100 1 1 6000 4 64 bfloat16 2048 mean entropy": [
        "score_kernel", "select_kernel", "part_kernel", "merge_kernel", *LISTS,
    ],
    "sm_80,sm_90 1 1 6000 8 32 float16 512 mean docs variance": [
        "score_kernel", "select_kernel", "part_kernel", "merge_kernel", *LISTS,
    ],
    "sm_90 1 1 6000 8 32 float16 512 mean docs": ["score_kernel", "select_kernel", *LISTS],
    "sm_90 1 1 6000 4 64 float32 2048 mean": [
        "score_kernel", "select_kernel",
        *["score_kernel", "shrink_kernel", "select_kernel"] * 2,
    ],
    "sm_80,sm_90 128 64 8192 4 64 bfloat16+float32 2048 max docs": [
        "score_kernel", "select_kernel",
    ],
    "sm_90 64 1 8192 4 64 bfloat16 2048 mean docs": [
        "pool_kernel", "score_kernel", "select_kernel",
    ],
    "sm_90,sm_100 64 64 131072 4 64 bfloat16+float8_e4m3fn 2048 mean": [
        "pool_kernel", "score_kernel", "select_kernel",
    ],
    "sm_90,sm_100 1 1 4096 4 64 bfloat16+float8_e4m3fn 2048 mean mean,256,16": COARSE,
}  # fmt: skip


def lines_of(program: str, *arguments: str):
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / program), *arguments],
        capture_output=True,
        text=True,
        env=environ,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("shape", "target"), CASES)
def test_launches_compile_within_limits(shape, target):
    rows = lines_of("aot_compile.py", target, *SHAPES[shape].split())
    names = {row["kernel"] for row in rows}
    expected = {"forward_kernel", "delta_kernel", "dq_kernel", "decode_kernel", "merge_kernel"}
    if shape == "token":
        expected |= {"mark_kernel", "sweep_kernel", "pack_kernel", "pair_sums_kernel"}
        expected |= {"invert_kernel", "owned_kernel"}
    elif shape == "block":
        expected |= {"mark_kernel", "sweep_kernel", "own_mass_kernel", "dkv_kernel"}
        expected |= {"tile_kernel", "tile_bits_kernel", "tile_lists_kernel"}
        expected |= GATHERING | {"parts_kernel", "sum_kernel"}
    else:
        expected |= {"mass_kernel", "tile_kernel"}
        if shape != "token_in_tile":
            expected |= {"dkv_kernel", "tile_bits_kernel", "tile_lists_kernel"}
    assert names == expected
    for row in rows:
        assert row["shared"] <= SHARED[target], row
        most = LOCAL.get(row["kernel"], 8)
        if (row["kernel"], shape, target) == ("forward_kernel", "tile", "sm_90"):
            most = DESCRIPTORS
        assert row["local"] <= most, row


@pytest.mark.parametrize("granularity", ["64 64", "64 1"])
def test_a_single_token_compiles(granularity):
    """Triton compiles an argument of 1 as a constant, which a kernel may not assign to."""
    rows = lines_of("aot_compile.py", "sm_90", *granularity.split(), *"1 4 2 64 bfloat16".split())
    assert {"forward_kernel", "dq_kernel", "dkv_kernel"} <= {row["kernel"] for row in rows}


@pytest.mark.parametrize("arguments", SELECTIONS)
def test_selections_compile_and_launch_little(arguments):
    pytorch, kernels, *rows = lines_of("aot_select.py", *arguments.split())
    assert kernels == SELECTIONS[arguments]
    # Per choice a flag, and the test that no NaN has cleared it, per choice from lists a count of
    # wrong guesses. Several chunks are copied.
    choices, coarse = kernels.count("select_kernel"), "running_kernel" in kernels
    lists = kernels.count("pick_kernel")
    chunks = choices // (1 + coarse) + lists
    sample = 7 if lists else 0  # which keys, and these keys
    copies = 0 if chunks == 1 else chunks + 1
    if "part_kernel" not in kernels:  # a rule is PyTorch
        assert len(pytorch) == 2 * choices + 3 * lists + coarse + sample + copies
    for row in rows:
        assert row["shared"] <= min(SHARED.values()) and row["local"] <= 8, row
