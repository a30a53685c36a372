"""Settings of attention components that cannot work, refused before training. No torch."""

from typing import Any

from gsa_platform.capabilities import device_kind
from gsa_platform.errors import UserError

CUDA_BACKENDS = ("cudnn", "efficient", "fa3")
HALF_BACKENDS = ("cudnn", "flash", "fa3")  # on CUDA, in bfloat16 or float16 only


def refuse(config: Any) -> None:
    """Raise UserError for the first setting of the configured attention that cannot work."""
    check = {"dense": _dense}.get(config.attention.name)
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
