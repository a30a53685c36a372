"""Time and memory of a call on the device at hand, and what that device is."""

import importlib.metadata
import itertools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .work import Rates


def milliseconds(call: Callable[[], Any], device: torch.device, budget_s: float = 1.0) -> float:
    """Median over at least 3 calls after one to warm up, about `budget_s` seconds of them; a
    second call alone if that takes longer than twice the budget.

    On a GPU the calls are queued without waiting in between, as the layers of a model are.
    """
    call()  # may compile
    if device.type != "cuda":
        times = [_seconds(call)]
        if times[0] > 2 * budget_s:
            return times[0] * 1e3
        while len(times) < 3 or (sum(times) < budget_s and len(times) < 50):
            times.append(_seconds(call))
        return statistics.median(times) * 1e3
    once = _queued(call, 1)[0]
    if once > 2e3 * budget_s:
        return once
    return statistics.median(_queued(call, int(min(50, max(3, budget_s * 1e3 / max(once, 1e-3))))))


def host_milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median time a call that has run before keeps the host, which does not wait for the device:
    no sequence of calls is faster. 0 on a CPU, where there is nothing to wait for."""
    if device.type != "cuda":
        return 0.0
    times = []
    for _ in range(9):
        torch.cuda.synchronize()
        times.append(_seconds(call))
    return statistics.median(times) * 1e3


def turns_milliseconds(
    calls: Sequence[Callable[[], Any]], device: torch.device, budget_s: float = 1.0
) -> float:
    """`milliseconds` of one of these calls, which take turns."""
    return milliseconds(rotate(calls), device, budget_s)


def graph_milliseconds(
    calls: Sequence[Callable[[], Any]], device: torch.device, budget_s: float = 1.0
) -> float:
    """Milliseconds of one of these calls, which have run before, where a CUDA graph makes them all
    and the host cannot slow them. 0 on a CPU, and of calls that no graph can hold."""
    if device.type != "cuda":
        return 0.0
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:
        return 0.0
    return milliseconds(graph.replay, device, budget_s) / len(calls)


def rotate(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """A call that makes each of these in turn."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _queued(call: Callable[[], Any], repeats: int) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Device memory a call allocates at its peak, above what is held before it; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """What a large matrix product and a copy reach on the device, in this process."""
    cuda = device.type == "cuda"
    n = 8192 if cuda else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = milliseconds(lambda: a @ b, device, 0.3)
    source = torch.empty(1 << (30 if cuda else 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), device, 0.3)
    return Rates(2e3 * n**3 / product, 2e3 * source.numel() / copy)


def environment(device: torch.device) -> dict[str, str]:
    """Device, driver, versions and commit, as every result file states them. GSA_COMMIT names the
    commit where the package is not in a checkout."""
    found = {"device": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"}
    found["driver"] = "none"
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["driver"] = _output(*query)
    found["torch"], found["triton"] = torch.__version__, version("triton")
    found["python"] = platform.python_version()
    here = ("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")
    found["commit"] = os.environ.get("GSA_COMMIT") or _output(*here)
    return found


def version(package: str) -> str:
    """Of an installed package; "not installed" otherwise."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return (done.stdout.strip().splitlines() or ["unknown"])[0]
