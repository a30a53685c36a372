"""Which preset fits which machine."""

from __future__ import annotations

import pytest

from gsa_platform.hardware import Hardware, detect, pick

CLASSES = ["cpu", "cuda_24gb", "cuda_80gb"]


def gpu(memory: float) -> Hardware:
    return Hardware("cuda", "Test GPU", 1, memory, 8, 64.0)


@pytest.mark.parametrize(
    ("memory", "expected"),
    [(139.8, "cuda_80gb"), (79.1, "cuda_80gb"), (44.4, "cuda_24gb"), (23.5, "cuda_24gb")],
)
def test_largest_entry_that_fits(memory, expected):
    chosen, reason = pick(CLASSES, gpu(memory))
    assert chosen == expected
    assert f"{memory:.0f} GiB" in reason


def test_small_gpu_takes_the_plain_entry_then_the_cpu_entry():
    assert pick([*CLASSES, "cuda"], gpu(8))[0] == "cuda"
    chosen, reason = pick(CLASSES, gpu(8))
    assert chosen == "cpu" and "less than the smallest" in reason
    assert pick(["cuda_24gb"], gpu(8))[0] == ""


def test_machine_without_gpu():
    cpu = Hardware("cpu", "CPU", 1, 16.0, 4, 16.0)
    assert pick(CLASSES, cpu)[0] == "cpu"
    assert pick(["cuda_24gb"], cpu)[0] == ""


def test_detect_describes_this_machine():
    machine = detect()
    assert machine.kind in ("cpu", "cuda")
    assert machine.cores >= 1 and machine.count >= 1 and machine.ram_gb > 0
