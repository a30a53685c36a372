"""Every combination of the slots trains, or is refused with a message that says what to type.
There is no third outcome.

The gate multiplies values and outputs and sees nothing of the other slots, so each combination of
those is taken with one gate, in turn.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from gsa_platform import compose, registry
from gsa_platform.components import SLOTS
from gsa_platform.errors import UserError
from gsa_platform.module import LanguageModel
from gsa_platform.validate import validate

CONTEXT, VOCABULARY = 96, 64
# Settings under which each mode leaves keys out of so short a sequence.
GRANULARITY = {
    "token": {"key_block": 1, "query_tile": 1},
    "block": {"key_block": 16, "query_tile": 1},
    "tile": {"key_block": 16, "query_tile": 16},
}
SETTINGS = {
    "attention": {"window": 16, "sinks": 4},
    "indexer": {"heads": 2, "dim": 8, "pool": 16, "survivors": 6},
    "sparsity": {"k": 48, "k_min": 32, "k_max": 64, "k_start": 64, "window": 8, "sinks": 4,
                 "rows": 2},
    "objective": {"dense_rows": 2},
}  # fmt: skip
# Of 4 indexers that learn and 3 that do not, 6 budgets and 4 objectives (1 where nothing learns).
TRAINED = {"gsa token": 114, "gsa block": 114, "gsa tile": 114, "dense": 1, "sliding_window": 1}


def variants() -> list[str]:
    """Every attention, and each of its modes."""
    found = registry.get()
    names = []
    for name in found.names("attention"):
        modes = found.component("attention", name).capabilities.modes
        names += [f"{name} {mode}" for mode in modes] or [name]
    return names


@functools.cache
def base() -> DictConfig:
    size = ["model.d_model=16", "model.n_layers=1", "model.head_dim=8", "model.ffn_dim=16"]
    run = ["picked.hardware=none", "trainer=cpu", "tracking=none", f"context={CONTEXT}"]
    return compose.load([*run, *size])


def composed(choice: dict[str, str], mode: str) -> Any:
    """The configuration with these components, as if each had been typed; raises UserError."""
    cfg: Any = base().copy()
    OmegaConf.set_struct(cfg, False)
    for slot, name in choice.items():
        cfg[slot] = OmegaConf.structured(registry.get().component(slot, name).config)
    compose.resolve_slots(cfg, set(choice))
    wanted = dict(SETTINGS)
    if mode:
        wanted["attention"] = {"mode": mode, **GRANULARITY[mode]}
    for slot, values in wanted.items():
        cfg[slot].update({key: value for key, value in values.items() if key in cfg[slot]})
    validate(cfg)
    return cfg


def train_one_step(cfg: Any) -> None:
    torch.manual_seed(0)
    module = LanguageModel(cfg, VOCABULARY, registry.get())
    text = torch.randint(0, VOCABULARY, (1, CONTEXT + 1))
    nll, n, out = module.losses({"tokens_BT": text[:, :-1], "targets_BT": text[:, 1:]})
    report = out.reports[0]
    extra = [loss for loss in (report.index_loss, report.budget_loss) if loss is not None]
    loss = nll / n + sum(extra)
    loss.backward()
    assert torch.isfinite(loss), loss
    for name, parameter in module.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    # An objective is there to teach the indexer: a combination where it cannot is a third outcome.
    learned = [p for n, p in module.named_parameters() if ".indexer." in n and p.grad is not None]
    assert bool(learned) == (cfg.objective.name != "none"), "what the indexer learns from"


@pytest.mark.parametrize("variant", variants())
def test_every_combination_trains_or_is_refused(variant: str) -> None:
    found = registry.get()
    attention, _, mode = variant.partition(" ")
    slots = ("indexer", "sparsity", "objective")
    gates = itertools.cycle(found.names("gate"))
    trained, third = 0, []
    for names in itertools.product(*map(found.names, slots)):
        choice = {"attention": attention, **dict(zip(slots, names)), "gate": next(gates)}
        typed = " ".join(f"{slot}={name}" for slot, name in choice.items())
        try:
            train_one_step(composed(choice, mode))
            trained += 1
        except UserError as error:
            if not any(f"{slot}=" in str(error) for slot in SLOTS):
                third.append(f"{typed}: refused without naming a slot: {error}")
        except Exception as error:
            third.append(f"{typed}: {type(error).__name__}: {error}")
    assert not third, f"{variant}, {len(third)} combinations:\n" + "\n".join(third)
    assert trained == TRAINED.get(variant, trained)
    assert trained or found.entry("attention", attention).unavailable() or attention == "xformers"


CHOICES = [(slot, name) for slot in SLOTS for name in registry.get().names(slot)]


@pytest.mark.parametrize(("slot", "name"), CHOICES, ids=[f"{s}={n}" for s, n in CHOICES])
def test_every_choice_composes_as_typed(slot: str, name: str) -> None:
    """From the command line, with the defaults of every setting, for this machine's CPU."""
    typed = ["trainer=cpu", f"{slot}={name}"]
    if slot in ("indexer", "sparsity", "objective") and name == "none":
        typed += ["attention=dense"] if slot != "objective" else []
    if slot == "indexer" and name in ("oracle", "random", "strided"):
        typed += ["objective=none"]
    try:
        cfg = compose.load(typed)
        validate(cfg)
        assert cfg[slot].name == name
    except UserError as error:
        assert f"{slot}={name}" in str(error)
        assert slot == "attention", error
