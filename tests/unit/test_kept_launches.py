"""Launches that keep the compiled kernel: which calls may share one."""

from __future__ import annotations

import pytest
import torch

from gsa_kernels import launch


class Kernel:
    """Counts compilations, as a Triton function does them, and records launches."""

    arg_names = ["x", "n", "scale", "BLOCK", "FLAG"]

    def __init__(self):
        self.compiled, self.launches = 0, []

    def __getitem__(self, grid):
        def call(*args, enable_fp_fusion, num_warps=4, **constants):
            assert enable_fp_fusion
            self.compiled += 1
            values = [*args, *(constants[n] for n in self.arg_names[len(args) :])]
            self.launches.append((*grid, *values[1:]))
            return Compiled(self)

        return call


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        assert len(grid) >= 3
        return lambda *values: self.kernel.launches.append((*grid[:2], *values[1:]))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launch, "_keeps", lambda device: True)
    monkeypatch.setattr(launch, "_kept", {})
    return Kernel()


def run(kernel, x=None, n=16, scale=0.5, block=32, flag=True, warps=4, grid=(3, 2)):
    x = torch.zeros(64) if x is None else x
    launch.run(kernel, grid, x, n, scale, FLAG=flag, BLOCK=block, num_warps=warps)


def test_a_call_like_an_earlier_one_binds_nothing_anew(kernel):
    for grid in ((3, 2), (5, 2), (7, 2)):
        run(kernel, grid=grid)
    assert kernel.compiled == 1
    # Constants in the kernel's order, whatever that of the call.
    assert kernel.launches == [(g, 2, 16, 0.5, 32, True) for g in (3, 5, 7)]


@pytest.mark.parametrize(
    "other",
    [
        {"n": 17},
        {"n": 1},
        {"n": 1 << 32},
        {"block": 64},
        {"flag": False},
        {"warps": 8},
        {"x": torch.zeros(64, dtype=torch.bfloat16)},
        {"x": torch.zeros(64)[1:]},  # not aligned to 16 bytes
    ],
)
def test_what_triton_compiles_for_is_told_apart(kernel, other):
    run(kernel)
    run(kernel, **other)
    assert kernel.compiled == 2


def test_an_unaligned_tensor_does_not_get_the_kernel_of_an_aligned_one(kernel):
    for _ in range(2):
        run(kernel, x=torch.zeros(64)[1:])
    assert kernel.compiled == 2
    run(kernel)
    assert kernel.compiled == 3


def test_numbers_that_grow_share_what_triton_compiles_for_them(kernel):
    for n in range(2, 100):
        run(kernel, n=n)
    assert kernel.compiled == 2  # multiples of 16, and others
    assert [values[2] for values in kernel.launches] == list(range(2, 100))


def test_constants_that_grow_do_not_fill_the_memory(kernel, monkeypatch):
    monkeypatch.setattr(launch, "_MOST", 8)
    for block in range(100):
        run(kernel, block=block)
    assert len(launch._kept) <= 8


def test_nothing_is_kept_off_a_gpu():
    other = Kernel()
    before = dict(launch._kept)
    run(other)
    run(other)
    assert other.compiled == 2 and launch._kept == before


def test_a_float_of_another_value_shares_a_kernel_and_an_equal_integer_does_not(kernel):
    for scale in (1.0, 0.25, 1):
        run(kernel, scale=scale)
    assert kernel.compiled == 2
    assert [values[3] for values in kernel.launches] == [1.0, 0.25, 1]
