"""xformers, loaded so that its CUDA operators are found, and which of them run here, and why not.

xformers 0.0.35 marks every operator as unusable unless its own extension loads, and that needs
libcudart.so.12: under a PyTorch built for CUDA 13 the package nvidia-cuda-runtime-cu12 provides
it, and it is loaded from there first, wherever the package lies.
"""

import ctypes
import importlib.metadata
import logging
from functools import cache
from typing import Any

import torch

RUNTIME = "nvidia-cuda-runtime-cu12"


@cache
def fmha() -> Any:
    """The module xformers.ops.fmha. Raises ValueError with the reason if it cannot be imported."""
    if torch.version.cuda is not None:
        _preload_runtime()
    log = logging.getLogger("xformers")
    level = log.level
    log.setLevel(logging.ERROR)  # what its import warns of, `status` says
    try:
        from xformers.ops import fmha
    except Exception as error:  # an extension of another PyTorch fails in many ways
        raise ValueError(f"xformers cannot be imported: {error}") from error
    finally:
        log.setLevel(level)
    return fmha


def reason(device_type: str) -> str:
    """Why no operator of memory_efficient_attention runs on this device; empty if one does."""
    if device_type != "cuda":
        return f"xformers has no memory_efficient_attention on {device_type}, only on cuda"
    found = operators()
    if any(not why for why in found.values()):
        return ""
    return "no operator is usable: " + "; ".join(f"{name}: {why}" for name, why in found.items())


@cache
def operators() -> dict[str, str]:
    """Each forward operator on this machine's GPU with "" if it is usable, else the reason."""
    module = fmha()
    kinds = (module.flash3, module.flash, module.cutlass, module.triton_splitk)
    return {kind.FwOp.NAME: _why_not(kind.FwOp) for kind in kinds}


def status() -> list[str]:
    """Lines for `plugins show`: what is installed, and each operator."""
    version = importlib.metadata.version("xformers")
    lines = [f"xformers {version}, PyTorch {torch.__version__}"]
    lines += [f"operator {name}: {why or 'usable'}" for name, why in operators().items()]
    return lines


def _why_not(operator: Any) -> str:
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if not operator.is_available():
        return "not built into this xformers and PyTorch"
    if not _extension_loaded():
        return f"the extension of xformers did not load{_load_error()}"
    capability = torch.cuda.get_device_capability()
    low = operator.CUDA_MINIMUM_COMPUTE_CAPABILITY
    high = operator.CUDA_MAXIMUM_COMPUTE_CAPABILITY
    if capability < low or (high is not None and capability > high):
        return f"not for GPUs of compute capability {capability[0]}.{capability[1]}"
    return ""


def _extension_loaded() -> bool:
    from xformers import _cpp_lib

    return bool(_cpp_lib._built_with_cuda)


def _load_error() -> str:
    from xformers import _cpp_lib

    error: BaseException | None = _cpp_lib._cpp_library_load_exception
    while error is not None and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__  # the loader's own words come last
    text = f": {error}" if error else ""
    hint = f" (pip install {RUNTIME})" if "libcudart.so.12" in text else ""
    return text + hint


def _preload_runtime() -> None:
    """Load libcudart.so.12 from the package that has it, if there is one."""
    try:
        files = importlib.metadata.files(RUNTIME) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for file in files:
        if file.name.startswith("libcudart.so.12"):
            try:
                ctypes.CDLL(str(file.locate()), mode=ctypes.RTLD_GLOBAL)
            except OSError:  # `status` tells what did not load
                continue
            return
