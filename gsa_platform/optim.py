"""Parameter groups, AdamW and learning-rate schedules."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gsa_platform.errors import UserError

SCHEDULES = ("cosine", "wsd", "constant")
DECAY_SHAPES = ("sqrt", "linear")


def _optional(node: Any, key: str, default: Any) -> Any:
    """node.key where present; works for DictConfig in struct mode and for plain namespaces."""
    try:
        present = key in node
    except TypeError:
        present = hasattr(node, key)
    return getattr(node, key) if present else default


def _named_owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Every use of every parameter: full name, module that holds it, parameter."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield (f"{prefix}.{name}" if prefix else name), module, parameter


def _decays(name: str, module: nn.Module, parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices, not for embeddings, norm gains and biases of any shape."""
    if parameter.ndim < 2 or isinstance(module, nn.Embedding):
        return False
    leaf = name.rsplit(".", 1)[-1].lower()
    owner = type(module).__name__.lower()
    return not ("norm" in owner or "norm" in leaf or leaf.endswith("bias") or "embed" in leaf)


def parameter_groups(model: nn.Module, optim_cfg: Any) -> list[dict[str, Any]]:
    """Trainable parameters in up to four groups, each once: decay and no_decay, and the same of
    the indexer (parameters below a module whose name contains "indexer").

    optim_cfg: lr, weight_decay, indexer_lr_multiplier. A parameter with several names (tied
    embeddings) decays, or belongs to the indexer, only if it does so under all of them. Each group
    has name, params, param_names, lr and weight_decay; empty groups are left out.
    """
    uses: dict[nn.Parameter, list[tuple[str, bool, bool]]] = {}
    for name, module, parameter in _named_owners(model):
        if parameter.requires_grad:
            indexer = "indexer" in name.rpartition(".")[0]
            uses.setdefault(parameter, []).append(
                (name, indexer, _decays(name, module, parameter))
            )

    groups: dict[str, dict[str, Any]] = {}
    for indexer in (False, True):
        for decay in (True, False):
            name = ("indexer_" if indexer else "") + ("decay" if decay else "no_decay")
            groups[name] = {
                "name": name,
                "params": [],
                "param_names": [],
                "lr": float(optim_cfg.lr) * (optim_cfg.indexer_lr_multiplier if indexer else 1.0),
                "weight_decay": float(optim_cfg.weight_decay) if decay else 0.0,
            }
    for parameter, names in uses.items():
        in_indexer = all(indexer for _, indexer, _ in names)
        decay = all(decays for _, _, decays in names)
        group = groups[("indexer_" if in_indexer else "") + ("decay" if decay else "no_decay")]
        group["params"].append(parameter)
        group["param_names"].append(names[0][0])

    grouped = [parameter for group in groups.values() for parameter in group["params"]]
    trainable = {p for p in model.parameters() if p.requires_grad}
    assert len(grouped) == len(trainable) and set(grouped) == trainable
    return [group for group in groups.values() if group["params"]]


def build_optimizer(model: nn.Module, cfg: Any) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, fused where all parameters are on CUDA devices.

    cfg: root config; reads cfg.optim (lr, betas, eps, weight_decay, indexer_lr_multiplier).
    """
    groups = parameter_groups(model, cfg.optim)
    if not groups:
        raise UserError("the model has no trainable parameter")
    on_cuda = all(p.is_cuda for group in groups for p in group["params"])
    beta1, beta2 = (float(beta) for beta in cfg.optim.betas)
    return torch.optim.AdamW(
        groups,
        lr=float(cfg.optim.lr),
        betas=(beta1, beta2),
        eps=float(cfg.optim.eps),
        fused=True if on_cuda else None,
    )


def lr_factor(
    step: int,
    *,
    schedule: str,
    steps: int,
    warmup_steps: int = 0,
    min_lr_ratio: float = 0.1,
    decay_fraction: float = 0.2,
    decay_shape: str = "sqrt",
) -> float:
    """Learning rate at optimizer step `step` (0-based), as a multiple of the peak.

    Linear warm-up reaches 1 at step warmup_steps - 1. Then cosine: half a cosine down to
    min_lr_ratio at `steps`; wsd: 1 until the last decay_fraction of `steps`, which falls to
    min_lr_ratio linearly or as 1 - sqrt (Haegele et al. 2024, arXiv 2405.18392); constant: 1.
    Past `steps` the last value holds.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    start = warmup_steps
    if schedule == "wsd":
        start = max(start, steps - round(decay_fraction * steps))
    if step < start:
        return 1.0
    progress = min(1.0, (step - start) / (steps - start)) if steps > start else 1.0
    if schedule == "cosine":
        shape = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        shape = 1.0 - (math.sqrt(progress) if decay_shape == "sqrt" else progress)
    return min_lr_ratio + (1.0 - min_lr_ratio) * shape


def warmup_steps(wanted: float, steps: int) -> int:
    """Warm-up of a run of `steps`: optim.warmup_steps, or below 1 that share of them."""
    return round(wanted * steps) if wanted < 1 else int(wanted)


def build_schedule(optimizer: Optimizer, cfg: Any) -> LambdaLR:
    """Scheduler of `lr_factor` over cfg.train.steps optimizer steps; step it after each of them.

    cfg: root config; reads train.steps and optim.{schedule, warmup_steps, decay_fraction,
    min_lr_ratio} and, where present, optim.decay_shape ("sqrt" or "linear").
    Raises UserError for an unknown schedule or decay shape, and for impossible numbers.
    """
    optim, steps = cfg.optim, int(cfg.train.steps)
    warmup = warmup_steps(float(optim.warmup_steps), steps)
    fraction = float(optim.decay_fraction)
    floor, shape = float(optim.min_lr_ratio), str(_optional(optim, "decay_shape", "sqrt"))
    if optim.schedule not in SCHEDULES:
        raise UserError(f"optim.schedule={optim.schedule!r}: choose one of {', '.join(SCHEDULES)}")
    if shape not in DECAY_SHAPES:
        raise UserError(f"optim.decay_shape={shape!r}: choose one of {', '.join(DECAY_SHAPES)}")
    if warmup < 0:
        raise UserError(f"optim.warmup_steps={optim.warmup_steps:g}: must be 0 or more")
    for key, value in (("decay_fraction", fraction), ("min_lr_ratio", floor)):
        if not 0.0 <= value <= 1.0:
            raise UserError(f"optim.{key}={value}: must be between 0 and 1")

    def factor(step: int) -> float:
        return lr_factor(
            step,
            schedule=optim.schedule,
            steps=steps,
            warmup_steps=warmup,
            min_lr_ratio=floor,
            decay_fraction=fraction,
            decay_shape=shape,
        )

    return LambdaLR(optimizer, factor)
