"""Checks a composed configuration before anything expensive starts. Every problem is reported at
once, each with its value, what is allowed and what to type. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from glob import iglob
from pathlib import Path
from typing import Any

from gsa_platform import hardware, registry
from gsa_platform.errors import UserError, suggest

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
IMPLEMENTATIONS = ("auto", "eager", "reference", "triton")
CHOICES = {
    "data.name": ("stdlib", "text", "hf"),
    "optim.name": ("adamw",),
    "optim.schedule": ("cosine", "wsd", "constant"),
    "trainer.accelerator": ("auto", "cpu", "cuda", "gpu"),
    "trainer.precision": PRECISIONS,
    "tracking.name": ("mlflow", "none"),
    "model.rope_scaling.kind": ("none", "yarn"),
}
AT_LEAST_ONE = (
    "context model.d_model model.n_layers model.n_heads model.n_kv_heads train.batch_size "
    "train.accumulate train.steps train.log_every train.ce_chunk trainer.num_nodes"
).split()
NOT_NEGATIVE = (
    "model.head_dim model.ffn_dim data.max_bytes data.workers optim.weight_decay optim.clip "
    "optim.warmup_steps train.val_every train.val_batches train.checkpoint_every"
).split()
# Granularity (keys chosen together, queries sharing a choice) that a mode allows, smallest first.
KEY_BLOCKS = {"token": (1,), "block": (16, 32, 64, 128), "tile": (1, 2, 4, 8, 16, 32, 64, 128)}
QUERY_TILES = {"token": (1,), "block": (1,), "tile": (16, 32, 64)}
DEFAULT_KEY_BLOCK = {"token": 1, "block": 64, "tile": 64}

Problems = Iterator[str]


def validate(cfg: Any) -> None:
    """Raise one UserError that lists every problem of a resolved configuration."""
    checks: tuple[Callable[[Any], Problems], ...] = (
        _enumerations,
        _numbers,
        _model,
        _layer_pattern,
        _components,
        _granularity,
        _budget,
        _objective,
        _optimisation,
        _files,
    )
    problems = [problem for check in checks for problem in check(cfg)]
    problems += _plugin_checks(cfg)
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(f"{len(problems)} problems in the configuration:\n{listed}")


def _one_of(key: str, value: Any, allowed: Iterable[Any]) -> Problems:
    allowed = [str(a) for a in allowed]
    if str(value) not in allowed:
        use = "Use" if len(allowed) > 1 else "Only"
        yield f"{key}={value} is unknown.{suggest(value, allowed)} {use} {_listed(key, allowed)}."


def _listed(key: str, allowed: Iterable[Any]) -> str:
    *most, last = [str(a) for a in allowed]
    return f"{key}={', '.join(most)} or {last}" if most else f"{key}={last}"


def _enumerations(cfg: Any) -> Problems:
    for key, allowed in CHOICES.items():
        yield from _one_of(key, _value(cfg, key), allowed)
    if cfg.attention.name == "gsa":
        yield from _one_of("attention.impl", cfg.attention.impl, IMPLEMENTATIONS)


def _value(cfg: Any, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _numbers(cfg: Any) -> Problems:
    for keys, low in ((AT_LEAST_ONE, 1), (NOT_NEGATIVE, 0)):
        for key in keys:
            if _value(cfg, key) < low:
                yield f"{key}={_value(cfg, key)} must be at least {low}. Type {key}={low} or more."
    if cfg.optim.lr <= 0:
        yield f"optim.lr={cfg.optim.lr} must be positive. Type optim.lr=3e-4, for example."
    devices = cfg.trainer.devices
    text = str(devices)
    if text not in ("auto", "-1") and not (text.isdigit() and int(text) >= 1):
        yield (
            f"trainer.devices={devices} must be a positive number, or -1 or auto for every GPU. "
            "Type trainer.devices=1."
        )
    for key in ("data.val_fraction", "optim.decay_fraction", "optim.min_lr_ratio"):
        if not 0 <= _value(cfg, key) <= 1:
            yield f"{key}={_value(cfg, key)} must be between 0 and 1. Type {key}=0.1, for example."


def _model(cfg: Any) -> Problems:
    model = cfg.model
    heads, kv_heads = model.n_heads, model.n_kv_heads
    if min(heads, kv_heads, model.d_model) < 1:
        return  # reported as numbers
    if heads % kv_heads:
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        yield (
            f"model.n_kv_heads={kv_heads} does not divide model.n_heads={heads}. "
            f"Type {_listed('model.n_kv_heads', divisors)}."
        )
    if model.head_dim == 0 and model.d_model % heads:
        yield (
            f"model.d_model={model.d_model} is not a multiple of model.n_heads={heads}. "
            f"Type model.d_model={-(-model.d_model // heads) * heads}, or set model.head_dim."
        )
    elif _head_dim(cfg) % 2:
        yield (
            f"model.head_dim={_head_dim(cfg)} must be even, for the rotary embedding. "
            f"Type model.head_dim={_head_dim(cfg) + 1}."
        )
    scaling = model.rope_scaling
    if scaling.kind == "yarn" and scaling.factor < 1:
        yield (
            f"model.rope_scaling.factor={scaling.factor} must be at least 1 "
            f"(context / original_context). Type model.rope_scaling.factor=4, for example."
        )


def _head_dim(cfg: Any) -> int:
    return int(cfg.model.head_dim or cfg.model.d_model // cfg.model.n_heads)


def _layer_pattern(cfg: Any) -> Problems:
    pattern = list(cfg.model.layer_pattern)
    names = registry.get().names("attention")
    total = 0
    for index, entry in enumerate(pattern):
        name, colon, count = str(entry).partition(":")
        if name != "*" and name not in names:
            yield (
                f"model.layer_pattern: '{entry}' names no attention.{suggest(name, names)} "
                f"Use {', '.join(names)}, or * for the configured one."
            )
        if colon and not (count.isdigit() and int(count) >= 1):
            yield (
                f"model.layer_pattern: '{entry}' needs a positive count after the colon. "
                f"Type {name}:1, for example."
            )
        elif colon:
            total += int(count)
        elif index < len(pattern) - 1:
            yield (
                f"model.layer_pattern: '{entry}' needs a count, since only the last entry may "
                f"fill the rest. Type {name}:1, for example."
            )
    if pattern and total > cfg.model.n_layers:
        yield (
            f"model.layer_pattern asks for {total} layers, model.n_layers={cfg.model.n_layers}. "
            f"Lower its counts, or type model.n_layers={total}."
        )


def _components(cfg: Any) -> Problems:
    """The chosen components against what they say they can do."""
    kind = cfg.trainer.accelerator
    kind = hardware.detect().kind if kind == "auto" else {"gpu": "cuda"}.get(kind, kind)
    dtype = "bfloat16" if str(cfg.trainer.precision).startswith("bf16") else "float32"
    for slot in registry.SLOTS:
        entry = registry.get().entry(slot, cfg[slot].name)
        chosen, can = f"{slot}={entry.component.name}", entry.component.capabilities
        if reason := entry.unavailable():
            yield f"{chosen} cannot run here: {reason}."
        if kind in ("cpu", "cuda") and kind not in can.devices:
            yield (
                f"{chosen} runs on {', '.join(can.devices)}, not on {kind}. "
                f"Type trainer.accelerator={can.devices[0]}, or another {slot}."
            )
        if dtype not in can.dtypes:
            yield (
                f"{chosen} computes in {', '.join(can.dtypes)}; trainer.precision="
                f"{cfg.trainer.precision} is {dtype}. Type another trainer.precision."
            )
        if slot == "attention" and can.head_dims and _head_dim(cfg) not in can.head_dims:
            yield (
                f"{chosen} has no kernel for heads of {_head_dim(cfg)}. "
                f"Type {_listed('model.head_dim', can.head_dims)}."
            )
        if not can.backward:
            yield f"{chosen} has no backward pass, so it cannot be trained. Type another {slot}."
        if not can.varlen and not cfg.data.cross_document:
            yield f"{chosen} cannot keep documents apart. Type data.cross_document=true."
        if not can.deterministic and cfg.train.deterministic:
            yield f"{chosen} is not deterministic. Type train.deterministic=false."


def _granularity(cfg: Any) -> Problems:
    attention = cfg.attention
    modes = registry.get().component("attention", attention.name).capabilities.modes
    if not modes or "mode" not in attention:
        return
    mode = attention.mode
    if mode not in modes:
        yield from _one_of("attention.mode", mode, modes)
        return
    for field, allowed in (("key_block", KEY_BLOCKS), ("query_tile", QUERY_TILES)):
        value = attention.get(field, 0)
        if value and mode in allowed and value not in allowed[mode]:
            yield (
                f"attention.{field}={value} does not fit attention.mode={mode}. "
                f"Type {_listed(f'attention.{field}', allowed[mode])}."
            )


def _budget(cfg: Any) -> Problems:
    sparsity = cfg.sparsity
    if sparsity.name == "none" or "k" not in sparsity:
        return
    block = cfg.attention.get("key_block", 0)
    block = block or DEFAULT_KEY_BLOCK.get(cfg.attention.get("mode", "token"), 1)
    window, sinks = sparsity.get("window", 0), sparsity.get("sinks", 0)
    for key, value, low in (("window", window, 1), ("sinks", sinks, 0)):
        if key in sparsity and value < low:
            yield f"sparsity.{key}={value} must be at least {low}. Type sparsity.{key}={low}."
    sink_keys = -(-sinks // block) * block
    for key in ("k", "k_min", "k_max"):
        if key not in sparsity:
            continue
        k = sparsity[key]
        smallest = max(block, -(-(window + sink_keys) // block) * block)
        if k < window + sink_keys:
            yield (
                f"sparsity.{key}={k} is below what is always attended: window {window} + sinks "
                f"{sink_keys}. Type sparsity.{key}={smallest} or more, or a smaller "
                "sparsity.window or sparsity.sinks."
            )
        elif k % block or k < block:
            yield (
                f"sparsity.{key}={k} is not a multiple of the {block} keys that are chosen "
                f"together (attention.key_block). Type sparsity.{key}="
                f"{max(smallest, k // block * block)}."
            )
    if {"k_min", "k_max"} <= set(map(str, sparsity)):
        if not sparsity.k_min <= sparsity.k <= sparsity.k_max:
            yield (
                f"sparsity.k={sparsity.k} is not between k_min={sparsity.k_min} and "
                f"k_max={sparsity.k_max}. Type sparsity.k_min=... or sparsity.k_max=... as well."
            )


def _objective(cfg: Any) -> Problems:
    if cfg.objective.name != "none" and cfg.indexer.name == "none":
        yield (
            f"objective={cfg.objective.name} trains an indexer, but indexer=none. "
            "Type objective=none, or choose an indexer."
        )


def _optimisation(cfg: Any) -> Problems:
    optim, steps = cfg.optim, cfg.train.steps
    if optim.warmup_steps and optim.warmup_steps >= steps:
        yield (
            f"optim.warmup_steps={optim.warmup_steps} must be below train.steps={steps}. "
            f"Type optim.warmup_steps={max(steps // 10, 0)}, or more train.steps."
        )
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        yield (
            f"optim.betas={list(optim.betas)} must be two numbers from 0 to below 1. "
            "Type 'optim.betas=[0.9,0.95]'."
        )


def _files(cfg: Any) -> Problems:
    data = cfg.data
    if data.tokenizer != "bytes" and not _path(data.tokenizer).is_file():
        yield (
            f"data.tokenizer={data.tokenizer}: no such file. "
            "Type data.tokenizer=bytes, or the path of a tokenizers JSON file."
        )
    if data.name == "text" and not data.paths:
        yield "data=text needs files. Type \"data.paths=['corpus/*.txt']\"."
    if data.name == "text":
        for pattern in data.paths:
            if next(iglob(os.path.expanduser(pattern), recursive=True), None) is None:
                yield (
                    f"data.paths: '{pattern}' matches no file (looked in {Path.cwd()}). "
                    "Type \"data.paths=['corpus/*.txt']\", for example."
                )
    if data.name == "hf" and not data.path:
        yield "data=hf needs a data set. Type data.path=FOLDER, or its name on the Hub."
    resume = cfg.train.resume
    if resume not in (None, "", "auto") and not _path(resume).exists():
        yield (
            f"train.resume={resume}: no such checkpoint. Type the path of a checkpoint or of a "
            "run folder, or train.resume=auto."
        )


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _plugin_checks(cfg: Any) -> list[str]:
    found = registry.get()
    problems = []
    for impl in found.manager.hook.gsa_validate.get_hookimpls():
        owner = next((p.name for p in found.plugins if p.module is impl.plugin), impl.plugin_name)
        try:
            impl.function(*[cfg] * len(impl.argnames))
        except UserError as error:
            problems.append(str(error))
        except Exception as error:
            raise UserError(
                f"The gsa_validate hook of plugin '{owner}' crashed: "
                f"{type(error).__name__}: {error}\n"
                f"  Report it to its author, or turn it off: GSA_DISABLE_PLUGINS={owner}."
            ) from error
    return problems
