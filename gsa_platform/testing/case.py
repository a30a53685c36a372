"""A component under test in a small model, composed, validated and built the way a run is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gsa_platform import compose, registry
from gsa_platform.components import SLOTS, Capabilities, Entry
from gsa_platform.errors import UserError
from gsa_platform.model.transformer import Transformer
from gsa_platform.testing.small import Sizes, candidates, fitting
from gsa_platform.validate import validate

WIDTH, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 32, 4, 2, 8, 2
BASE = ("picked.hardware=none", "tracking=none", "trainer.devices=1", "train.steps=10")


class Case:
    """One component in one mode, with its settings and what stands in the other slots.

    beside: overrides of the rest of the configuration, as typed on the command line.
    """

    def __init__(
        self,
        slot: str,
        name: str,
        settings: Mapping[str, Any] | None = None,
        beside: Sequence[str] = (),
        mode: str = "",
    ) -> None:
        self.slot, self.name, self.mode = slot, name, mode
        self.settings, self.beside = dict(settings or {}), tuple(beside)
        self._sizes: Sizes | None = None
        self._configs: dict[tuple[str, ...], Any] = {}

    # What is known without building anything

    @property
    def entry(self) -> Entry:
        return registry.get().entry(self.slot, self.name)

    @property
    def can(self) -> Capabilities:
        return self.entry.component.capabilities

    @property
    def present_devices(self) -> list[str]:
        """Device types of this machine."""
        return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

    @property
    def devices(self) -> list[str]:
        """Device types that the component declares and this machine has."""
        return [d for d in self.present_devices if d in self.can.devices]

    @property
    def device(self) -> str:
        return self.devices[0] if self.devices else "cpu"

    @property
    def head_dim(self) -> int:
        attention = registry.get().component("attention", self.chosen["attention"])
        dims = attention.capabilities.head_dims
        return HEAD_DIM if not dims or HEAD_DIM in dims else min(dims)

    def unavailable(self) -> str:
        """Why the component cannot be tried here, or an empty string."""
        component = self.entry.component
        if not component.target:
            return f"{self.slot}={self.name} builds nothing"
        if reason := self.entry.unavailable():
            return reason
        if not self.devices:
            here, declared = "/".join(self.present_devices), "/".join(self.can.devices)
            return f"declares devices {declared}, this machine has {here}"
        return ""

    # Configuration

    @cached_property
    def chosen(self) -> dict[str, str]:
        """The component in each slot; a slot that is left out takes the host's default."""
        found = registry.get()
        chosen: dict[str, str] = {"gate": "none", "objective": "none"}
        chosen["attention"] = attention_beside(self.slot)
        for text in self.beside:
            key, _, value = text.partition("=")
            if key in SLOTS:
                chosen[key] = value
        chosen[self.slot] = self.name
        if found.component("attention", chosen["attention"]).capabilities.modes:
            for slot, usual in (("indexer", "gated_lightning"), ("sparsity", "fixed")):
                names = [n for n in found.names(slot) if found.component(slot, n).target]
                chosen.setdefault(slot, usual if usual in names else (names or ["none"])[0])
        else:
            chosen.pop("objective")
        return chosen

    def given(self, slot: str) -> dict[str, Any]:
        """Settings that were given for a slot: by its record's trial, then by the caller."""
        component = registry.get().component(slot, self.chosen[slot])
        return {**component.trial.small, **(self.settings if slot == self.slot else {})}

    def overrides(self, sizes: Sizes, more: Sequence[str] = ()) -> list[str]:
        """The case as typed on the command line, `more` last."""
        head_dim = self.head_dim
        lines = [*BASE, f"trainer.accelerator={self.device}", f"context={sizes.length}"]
        model = {
            "d_model": HEADS * head_dim,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "n_kv_heads": KV_HEADS,
            "head_dim": head_dim,
            "ffn_dim": 48,
        }
        lines += [f"model.{key}={value}" for key, value in model.items()]
        for slot, name in self.chosen.items():
            component = registry.get().component(slot, name)
            lines.append(f"{slot}={name}")
            values = {**sizes.values(slot), **({"mode": sizes.mode} if sizes.mode else {})}
            values = {**fitting(component.config, values), **self.given(slot)}
            lines += [f"{slot}.{key}={json.dumps(value)}" for key, value in values.items()]
        lines += [t for t in self.beside if t.partition("=")[0] not in SLOTS]
        typed = {text.partition("=")[0] for text in more}
        return [line for line in lines if line.partition("=")[0] not in typed] + list(more)

    @property
    def sizes(self) -> Sizes:
        """The granularity in use; the finest one where nothing can be built."""
        if self._sizes is None:
            try:
                self.config()
            except UserError:
                return candidates(self.mode, self.given("attention"))[0]
        assert self._sizes is not None
        return self._sizes

    def config(self, *more: str) -> Any:
        """The validated configuration; the finest granularity that the component accepts."""
        if more not in self._configs:
            self._configs[more] = self._compose(more)
        return self._configs[more]

    def _compose(self, more: tuple[str, ...]) -> Any:
        first: UserError | None = None
        found = [self._sizes] if self._sizes else candidates(self.mode, self.given("attention"))
        for sizes in found:
            try:
                cfg = compose.load(self.overrides(sizes, more))
                validate(cfg)
                Transformer(cfg, 16, registry.get())
            except UserError as error:
                first = first or error
                continue
            self._sizes = sizes
            return cfg
        assert first is not None
        raise first

    # Models and texts

    @property
    def length(self) -> int:
        return int(self.config().context)

    @property
    def vocabulary(self) -> int:
        return 2 * self.length + 11

    @cached_property
    def dtype(self) -> torch.dtype:
        """float64, or float32 where the component does not compute in float64."""
        model, text = self.build(), self.text()
        try:
            self.run(model.double(), text).sum().backward()
        except Exception:  # a backend may refuse a dtype with any error of its own
            return torch.float32
        return torch.float64

    @property
    def close(self) -> float:
        """What two ways to compute the same may differ by (activations are of order 1)."""
        return 1e-6 if self.dtype == torch.float64 else 3e-4

    def build(self, *more: str, seed: int = 0) -> Transformer:
        """A model as a run builds it."""
        cfg = self.config(*more)
        torch.manual_seed(seed)
        return Transformer(cfg, self.vocabulary, registry.get()).to(self.device)

    def model(self, *more: str, seed: int = 0) -> Transformer:
        """A model in `dtype` whose components are past their initial values: weights that start
        at zero would hide what they multiply, and controllers have seen a text."""
        model = self.build(*more, seed=seed).to(self.dtype)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for layer in layers(model):
                for slot in SLOTS:
                    part = getattr(layer, slot)
                    for parameter in [] if part is None else part.parameters():
                        noise = torch.randn(parameter.shape, generator=generator)
                        parameter += 0.3 * noise.to(parameter)
            if any(layer.sparsity is not None for layer in layers(model)):
                torch.manual_seed(seed)
                reports = model(self.text(seed=9)).reports
                model.observe([report.statistics for report in reports])
        return model

    def text(self, batch: int = 2, length: int = 0, seed: int = 1) -> Tensor:
        """Random tokens [B, T], none of which repeats in its sequence."""
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randperm(self.vocabulary, generator=generator) for _ in range(batch)]
        return torch.stack(rows)[:, : length or self.length].to(self.device)

    def run(self, model: Transformer, text: Tensor, docs: Tensor | None = None) -> Tensor:
        """hidden_BTD. Seeded, so that a component that draws numbers draws the same ones."""
        torch.manual_seed(0)
        return model(text, docs).hidden_BTD

    def part(self, model: Transformer) -> Any:
        """The component under test in the first layer."""
        return getattr(layers(model)[0], self.slot)


def losses(reports: list[Any]) -> list[Tensor]:
    """What the components of each layer add to the language-model loss."""
    kinds = ("index_loss", "budget_loss")
    found = [getattr(report, kind, None) for report in reports for kind in kinds]
    return [loss for loss in found if loss is not None]


def layers(model: Transformer) -> list[Any]:
    """The attention layers of a model."""
    return [block.attention for block in model.blocks]


def attention_beside(slot: str) -> str:
    """The attention to try a component of another slot with: gsa, or dense for a gate."""
    found = registry.get()
    sparse = slot != "gate"
    usual = "gsa" if sparse else "dense"
    names = found.names("attention")
    able = [n for n in names if bool(found.component("attention", n).capabilities.modes) == sparse]
    if not able:
        kind = "takes a selection" if sparse else "attends to every key"
        raise UserError(f"a {slot} is tried with an attention that {kind}; there is none.")
    return usual if usual in able else able[0]
