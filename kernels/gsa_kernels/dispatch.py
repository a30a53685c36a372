"""Choice of an implementation by name: a named one never falls back, `auto` says what it took."""

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

IMPLEMENTATIONS = ("auto", "eager", "reference", "triton")


def resolve(operation: str, impl: str, device: torch.device, available: dict[str, str]) -> str:
    """The implementation to run. `available` maps each one to "" or why it cannot run here.

    Raises ValueError when the one asked for is unknown or cannot run on this device.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl {impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "auto":
        return "triton" if available.get("triton") == "" else "eager"
    reason = available.get(impl, "not implemented")
    if reason:
        can = ", ".join(name for name, why in available.items() if not why)
        raise ValueError(
            f"{operation}: impl={impl} cannot run: {reason}; usable here: {can}, auto"
        )
    return impl


def triton_reason(device: torch.device, interpreted: bool = False) -> str:
    """Why Triton kernels cannot run on this device; empty when they can.

    interpreted: a CPU will do where TRITON_INTERPRET=1 asks for Triton's (slow) interpreter.
    """
    return _triton_reason(device.type, interpreted)


@torch.compiler.assume_constant_result
def _triton_reason(device_type: str, interpreted: bool) -> str:
    # Looks at files and the environment, which a compiled graph cannot.
    # The device first: on a CPU, installing the package would change nothing.
    interpreted = interpreted and os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not interpreted:
        return f"Triton kernels need a CUDA device, not {device_type}"
    return "" if _has_triton() else "the package triton is not installed"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def undispatched(body: Callable[..., Any], operator: Any) -> Callable[..., Any]:
    """The operator inside torch.compile, its body elsewhere: dispatching a custom operator takes
    the host longer than launching its kernel. Only for operators without gradients."""

    def call(*args: Any) -> Any:
        return operator(*args) if torch.compiler.is_compiling() else body(*args)

    return call


def differentiable(
    body: Callable[..., Any],
    operator: Any,
    setup: Callable[..., None],
    gradients: Callable[..., Any],
    operator_gradients: Callable[..., Any],
) -> Callable[..., Any]:
    """As `undispatched`, for operators with gradients.

    setup and the gradients are what `register_autograd` takes, which is called here.
    operator_gradients: the gradients by operators only, for torch.compile.
    """
    operator.register_autograd(operator_gradients, setup_context=setup)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = body(*args)
            setup(ctx, args, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Any) -> Any:
            return gradients(ctx, *grads)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return operator(*args)
        return Direct.apply(*args) if torch.is_grad_enabled() else body(*args)

    return call
