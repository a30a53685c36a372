"""Every combination of the slots trains, or is refused with a message that says which slot to
change. There is no third outcome."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from gsa_platform import compose, registry
from gsa_platform.errors import UserError
from gsa_platform.module import LanguageModel
from gsa_platform.validate import validate

CONTEXT, VOCABULARY = 96, 64
TINY = [
    "picked.hardware=none",
    "tracking=none",
    f"context={CONTEXT}",
    "model.d_model=16",
    "model.n_layers=1",
    "model.head_dim=8",
    "model.ffn_dim=16",
]
# Settings under which each mode leaves keys out of so short a sequence.
MODES = {
    "token": {"key_block": 1, "query_tile": 1},
    "block": {"key_block": 16, "query_tile": 1},
    "tile": {"key_block": 8, "query_tile": 16},
}
BUDGET = {"k": 48, "k_min": 32, "k_max": 64, "window": 8, "sinks": 4}
# Combinations that train, so that refusing too much is noticed: 2 indexers, 2 budgets, 4 gates
# and 3 objectives; a dense attention leaves all but the gate empty.
EXPECTED = {"dense": 4, "token": 48, "block": 48, "tile": 48}


@functools.cache
def composed(attention: str) -> list[tuple[str, DictConfig | str]]:
    """(what was typed, its configuration or why it was refused) of every choice of the slots."""
    found = registry.get()
    slots = ("indexer", "sparsity", "objective", "gate")
    outcomes: list[tuple[str, DictConfig | str]] = []
    for choice in itertools.product(*map(found.names, slots)):
        typed = [f"attention={attention}", *(f"{s}={n}" for s, n in zip(slots, choice))]
        previous = outcomes[-1] if outcomes else None
        if previous and isinstance(previous[1], str) and choice[-1] != found.names("gate")[0]:
            # The rest is as before and was refused; no refusal is about the gate.
            outcomes.append((" ".join(typed), previous[1]))
            continue
        try:
            outcomes.append((" ".join(typed), compose.load([*TINY, *typed])))
        except UserError as error:
            outcomes.append((" ".join(typed), str(error)))
    return outcomes


def adapted(cfg: DictConfig, mode: str) -> Any:
    cfg = cfg.copy()
    wanted = [(cfg.sparsity, BUDGET)]
    if mode != "dense":
        wanted.append((cfg.attention, {"mode": mode, **MODES[mode]}))
    for node, values in wanted:
        node.update({key: value for key, value in values.items() if key in node})
    if cfg.objective.name == "kl":
        cfg.objective.dense_rows = 2
    return cfg


def train_one_step(cfg: Any) -> None:
    torch.manual_seed(0)
    module = LanguageModel(cfg, VOCABULARY, registry.get())
    text = torch.randint(0, VOCABULARY, (1, CONTEXT + 1))
    nll, n, out = module.losses({"tokens_BT": text[:, :-1], "targets_BT": text[:, 1:]})
    extra = [r.index_loss for r in out.reports if r.index_loss is not None]
    loss = nll / n + sum(extra)
    loss.backward()
    assert torch.isfinite(loss), loss
    for name, parameter in module.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    learns = module.model.blocks[0].attention.indexer is not None and cfg.objective.name != "none"
    assert bool(extra) == (cfg.objective.name == "kl")
    indexer = [p for n, p in module.named_parameters() if ".indexer." in n and p.grad is not None]
    assert bool(indexer) == learns


@pytest.mark.parametrize("mode", EXPECTED)
def test_every_combination_trains_or_is_refused(mode: str) -> None:
    trained, broken = 0, []
    for typed, outcome in composed("dense" if mode == "dense" else "gsa"):
        if isinstance(outcome, str):
            slots = ("indexer", "sparsity", "objective")
            if "attention=" not in outcome or not any(s in outcome for s in slots):
                broken.append(f"{typed}: refused without a way out: {outcome}")
            continue
        cfg = adapted(outcome, mode)
        try:
            validate(cfg)
            train_one_step(cfg)
            trained += 1
        except Exception as error:
            settings = OmegaConf.to_container(cfg.attention)
            broken.append(f"{typed} {settings}: {type(error).__name__}: {error}")
    assert not broken, "\n".join(broken)
    assert trained == EXPECTED[mode]
