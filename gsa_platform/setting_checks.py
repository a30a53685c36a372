"""Checks of single settings: known names, ranges, shapes that fit, files that exist."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from glob import iglob
from pathlib import Path
from typing import Any

from gsa_platform.errors import suggest

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
IMPLEMENTATIONS = ("auto", "eager", "reference", "triton")
CHOICES = {
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

Problems = Iterator[str]


def one_of(key: str, value: Any, allowed: Iterable[Any]) -> Problems:
    """A problem unless `value` is one of the allowed."""
    allowed = [str(a) for a in allowed]
    if str(value) not in allowed:
        use = "Use" if len(allowed) > 1 else "Only"
        yield f"{key}={value} is unknown.{suggest(value, allowed)} {use} {listed(key, allowed)}."


def listed(key: str, allowed: Iterable[Any]) -> str:
    """`key=a, b or c`."""
    *most, last = [str(a) for a in allowed]
    return f"{key}={', '.join(most)} or {last}" if most else f"{key}={last}"


def _enumerations(cfg: Any) -> Problems:
    for key, allowed in CHOICES.items():
        yield from one_of(key, _value(cfg, key), allowed)
    if cfg.attention.name == "gsa":
        yield from one_of("attention.impl", cfg.attention.impl, IMPLEMENTATIONS)


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
            f"Type {listed('model.n_kv_heads', divisors)}."
        )
    if model.head_dim == 0 and model.d_model % heads:
        yield (
            f"model.d_model={model.d_model} is not a multiple of model.n_heads={heads}. "
            f"Type model.d_model={-(-model.d_model // heads) * heads}, or set model.head_dim."
        )
    elif head_dim(cfg) % 2:
        yield (
            f"model.head_dim={head_dim(cfg)} must be even, for the rotary embedding. "
            f"Type model.head_dim={head_dim(cfg) + 1}."
        )
    scaling = model.rope_scaling
    if scaling.kind == "yarn" and scaling.factor < 1:
        yield (
            f"model.rope_scaling.factor={scaling.factor} must be at least 1 "
            f"(context / original_context). Type model.rope_scaling.factor=4, for example."
        )


def head_dim(cfg: Any) -> int:
    """Width of a head, set or derived."""
    return int(cfg.model.head_dim or cfg.model.d_model // cfg.model.n_heads)


def _optimisation(cfg: Any) -> Problems:
    optim, steps = cfg.optim, cfg.train.steps
    warmup = optim.warmup_steps
    if warmup >= max(1, steps):
        yield (
            f"optim.warmup_steps={warmup:g} must be below train.steps={steps}. "
            "Type optim.warmup_steps=0.1, a tenth of them, or more train.steps."
        )
    elif warmup > 1 and warmup != int(warmup):
        yield (
            f"optim.warmup_steps={warmup:g} must be whole, or a share of the steps, below 1. "
            f"Type optim.warmup_steps={int(warmup)}."
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


CHECKS = (_enumerations, _numbers, _model, _optimisation, _files)
