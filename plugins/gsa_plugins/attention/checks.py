"""Settings of attention components that cannot work, refused before training. No torch."""

from typing import Any

from gsa_platform.capabilities import device_kind
from gsa_platform.errors import UserError, suggest

CUDA_BACKENDS = ("cudnn", "efficient", "fa3")
HALF_BACKENDS = ("cudnn", "flash", "fa3")  # on CUDA, in bfloat16 or float16 only


def refuse(config: Any) -> None:
    """Raise UserError for the first setting of the configured attention that cannot work."""
    checks = {
        "dense": _dense,
        "sliding_window": _window,
        "flex": _flex,
        "xformers_sparse": _xformers_sparse,
    }
    check = checks.get(config.attention.name)
    if check is not None:
        check(config, device_kind(config))


def _dense(config: Any, kind: str) -> None:
    backend = config.attention.backend
    if kind == "cpu" and backend in CUDA_BACKENDS:
        raise UserError(
            f"attention.backend={backend} needs a CUDA device. "
            "Type attention.backend=auto, flash or math, or trainer.accelerator=cuda."
        )
    if kind == "cuda" and backend in HALF_BACKENDS and config.trainer.precision == "32-true":
        raise UserError(
            f"attention.backend={backend} has no float32 kernel, and trainer.precision=32-true. "
            "Type trainer.precision=bf16-mixed, or attention.backend=auto, efficient or math."
        )


def _window(config: Any, kind: str) -> None:
    window, sinks, impl = (config.attention[key] for key in ("window", "sinks", "impl"))
    _one_of("impl", impl, ("auto", "chunked", "flash"))
    if window < 1:
        raise UserError(f"attention.window={window} must be at least 1. Type attention.window=1.")
    if sinks < 0:
        raise UserError(f"attention.sinks={sinks} must be at least 0. Type attention.sinks=0.")
    if impl == "flash" and (kind == "cpu" or sinks or config.trainer.precision == "32-true"):
        raise UserError(
            "attention.impl=flash needs a CUDA device, attention.sinks=0 and "
            "trainer.precision=bf16-mixed or bf16-true. Type attention.impl=chunked, or auto."
        )


def _flex(config: Any, kind: str) -> None:
    _one_of("impl", config.attention.impl, ("auto", "compiled", "eager"))
    _one_of("block", config.attention.block, (64, 128, 256))
    if config.attention.impl == "compiled" and kind == "cpu":
        raise UserError(
            "attention.impl=compiled: FlexAttention has no backward on a CPU. "
            "Type attention.impl=eager or auto."
        )


def _xformers_sparse(config: Any, kind: str) -> None:
    if 0 < config.attention.key_block < 16:
        raise UserError(
            f"attention.key_block={config.attention.key_block}: xformers' block-sparse tensor has "
            "square cells of at least 16, which must divide C and R. "
            "Type attention.key_block=16, 32, 64 or 128, or attention=gsa."
        )


def _one_of(key: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        *most, last = map(str, choices)
        raise UserError(
            f"attention.{key}={value} is unknown.{suggest(str(value), map(str, choices))} "
            f"Use attention.{key}={', '.join(most)} or {last}."
        )
