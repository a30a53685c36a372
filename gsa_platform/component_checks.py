"""Checks of the chosen components: against the machine, the model, and each other."""

from __future__ import annotations

from typing import Any

from gsa_platform import registry
from gsa_platform.capabilities import because, device_kind, unmet
from gsa_platform.components import SLOTS
from gsa_platform.errors import suggest
from gsa_platform.setting_checks import Problems, head_dim, listed, one_of

# Granularity (keys chosen together, queries sharing a choice) that a mode allows, smallest first.
KEY_BLOCKS = {"token": (1,), "block": (16, 32, 64, 128), "tile": (1, 2, 4, 8, 16, 32, 64, 128)}
QUERY_TILES = {"token": (1,), "block": (1,), "tile": (16, 32, 64)}
DEFAULT_KEY_BLOCK = {"token": 1, "block": 64, "tile": 64}


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
    kind = device_kind(cfg)
    dtype = "bfloat16" if str(cfg.trainer.precision).startswith("bf16") else "float32"
    for slot in SLOTS:
        entry = registry.get().entry(slot, cfg[slot].name)
        chosen, can = f"{slot}={entry.component.name}", entry.component.capabilities
        if reason := entry.unavailable():
            yield f"{chosen} cannot run here: {reason}."
        if kind in ("cpu", "cuda") and kind not in can.devices:
            yield (
                f"{chosen} runs on {', '.join(can.devices)}, not on {kind}"
                f"{because(can, 'devices')}. "
                f"Type trainer.accelerator={can.devices[0]}, or another {slot}."
            )
        if dtype not in can.dtypes:
            yield (
                f"{chosen} computes in {', '.join(can.dtypes)}; trainer.precision="
                f"{cfg.trainer.precision} is {dtype}. Type another trainer.precision."
            )
        if slot == "attention" and can.head_dims and head_dim(cfg) not in can.head_dims:
            yield (
                f"{chosen} has no kernel for heads of {head_dim(cfg)}. "
                f"Type {listed('model.head_dim', can.head_dims)}."
            )
        if not can.backward:
            yield (
                f"{chosen} has no backward pass, so it cannot be trained"
                f"{because(can, 'backward')}. Type another {slot}."
            )
        if not can.varlen and not cfg.data.cross_document:
            yield f"{chosen} cannot keep documents apart. Type data.cross_document=true."
        if not can.deterministic and cfg.train.deterministic:
            yield (
                f"{chosen} is not deterministic{because(can, 'deterministic')}. "
                "Type train.deterministic=false."
            )


def _granularity(cfg: Any) -> Problems:
    attention = cfg.attention
    modes = registry.get().component("attention", attention.name).capabilities.modes
    if not modes or "mode" not in attention:
        return
    mode = attention.mode
    if mode not in modes:
        yield from one_of("attention.mode", mode, modes)
        return
    for field, allowed in (("key_block", KEY_BLOCKS), ("query_tile", QUERY_TILES)):
        value = attention.get(field, 0)
        if value and mode in allowed and value not in allowed[mode]:
            yield (
                f"attention.{field}={value} does not fit attention.mode={mode}. "
                f"Type {listed(f'attention.{field}', allowed[mode])}."
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


def _data(cfg: Any) -> Problems:
    found = registry.get()
    name = cfg.data.name
    yield from one_of("data", name, found.names("data"))
    if name in found.names("data") and (reason := found.entry("data", name).unavailable()):
        yield f"data={name} cannot run here: {reason}."


CHECKS = (_data, _layer_pattern, _components, unmet, _granularity, _budget, _objective)
