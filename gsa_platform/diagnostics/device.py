"""What a device is called, how much memory this process has used at most, can it compile."""

from __future__ import annotations

import platform
import resource
import sys

import torch

from gsa_platform.errors import UserError


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads, {platform.machine()})"


def peak_memory_gb(device: torch.device) -> float:
    """Peak of this process in GB (10^9 bytes): allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def check_compiler(device: torch.device) -> None:
    """Compile something small on `device`; raises UserError if that does not work here."""
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.ones(8, device=device))
    except Exception as error:  # a compiler can be missing or broken in many ways
        raise UserError(
            f"train.compile=true does not work here: {str(error).strip().partition(chr(10))[0]}. "
            "It needs a C++ compiler, such as g++, and on a GPU the package triton. Install what "
            "is missing, or leave out train.compile."
        ) from error
