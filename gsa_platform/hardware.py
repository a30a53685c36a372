"""What this machine offers, found without importing torch, and which preset fits it."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

GIB = 1024**3
_CLASS = re.compile(r"cuda_(\d+)gb")
# A card reports less than its nominal size: 44.5 GiB on one sold as 48 GB.
_NOMINAL_SHARE = 0.9


@dataclass(frozen=True)
class Hardware:
    """The machine. ``memory_gb`` is GiB of the first GPU, or of main memory on a CPU."""

    kind: str
    name: str
    count: int
    memory_gb: float
    cores: int
    ram_gb: float


def detect() -> Hardware:
    """Describe this machine. GPUs come from the driver library and honour CUDA_VISIBLE_DEVICES."""
    cores, ram = _cores(), _ram_gb()
    gpus = _cuda_devices()
    if gpus:
        name, memory = gpus[0]
        return Hardware("cuda", name, len(gpus), memory, cores, ram)
    return Hardware("cpu", "CPU", 1, ram, cores, ram)


def pick(classes: Iterable[str], machine: Hardware) -> tuple[str, str]:
    """Return (class, reason): the largest ``cuda_<N>gb`` that fits, else ``cuda``, else ``cpu``.

    The class is an empty string where no entry fits.
    """
    classes = list(classes)
    found = f"{machine.name}, {machine.memory_gb:.0f} GiB"
    if machine.kind == "cuda":
        sizes = {int(m.group(1)): c for c in classes if (m := _CLASS.fullmatch(c))}
        fitting = [n for n in sizes if machine.memory_gb >= _NOMINAL_SHARE * n]
        if fitting:
            return sizes[max(fitting)], f"found {found}"
        if "cuda" in classes:
            return "cuda", f"found {found}"
        if "cpu" in classes and sizes:
            return "cpu", f"found {found}, less than the smallest GPU entry asks for"
        return "", f"no entry fits {found}"
    if "cpu" in classes:
        return "cpu", f"found no GPU, {machine.cores} CPU cores, {machine.ram_gb:.0f} GiB"
    return "", "no entry for a machine without a GPU"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _ram_gb() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    except (AttributeError, ValueError, OSError):  # no sysconf on Windows
        return 0.0


def _cuda_devices() -> list[tuple[str, float]]:
    """Return (name, GiB) per visible GPU; empty without a driver."""
    for library in ("libcuda.so.1", "libcuda.so", "nvcuda.dll"):
        try:
            cuda = ctypes.CDLL(library)
            break
        except OSError:
            continue
    else:
        return []
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    devices = []
    for index in range(count.value):
        device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
        if cuda.cuDeviceGet(ctypes.byref(device), index) != 0:
            continue
        cuda.cuDeviceGetName(name, len(name), device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        devices.append((name.value.decode(errors="replace"), memory.value / GIB))
    return devices
