"""Every combination of components: it works, or it is refused with a reason. No third outcome."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from omegaconf import DictConfig, OmegaConf

from gsa_platform import compose, registry
from gsa_platform.components import SLOTS
from gsa_platform.errors import UserError, unknown
from gsa_platform.model.transformer import Transformer
from gsa_platform.testing.case import Case, losses
from gsa_platform.testing.small import Sizes, fitting
from gsa_platform.validate import validate

WORKS, REFUSED, BROKEN = "works", "refused", "BROKEN"
VOCABULARY, TOKENS = 64, 48


@dataclass(frozen=True)
class Combination:
    """A component for every slot, and the mode of the attention ("" if it has none)."""

    names: Mapping[str, str]
    mode: str = ""

    @property
    def attention(self) -> str:
        """`gsa/tile` for gsa in tile mode."""
        return self.names["attention"] + (f"/{self.mode}" if self.mode else "")

    def __str__(self) -> str:
        rest = " ".join(f"{slot}={self.names[slot]}" for slot in SLOTS if slot != "attention")
        return f"attention={self.attention} {rest}"


@dataclass(frozen=True)
class Outcome:
    combination: Combination
    result: str
    reason: str = ""
    seconds: float = 0.0


@dataclass
class Matrix:
    """Which components vary and which are fixed, and the configurations to try them in.

    varied: slots whose every component is tried; given: names a slot is restricted to. With
    neither, every slot varies. A slot that is neither takes the host's default, which a dense
    attention may empty without being refused.
    """

    varied: Sequence[str] = ()
    given: Mapping[str, Sequence[str]] = field(default_factory=dict)
    device: str = "cpu"

    def __post_init__(self) -> None:
        found = registry.get()
        for slot in (*self.varied, *self.given):
            if slot not in SLOTS:
                raise UserError(unknown("slot", slot, SLOTS))
        for slot, names in self.given.items():
            for name in names:
                found.component(slot, name)
        if not self.varied and not self.given:
            self.varied = SLOTS
        elif not self.varied:
            self.varied = [slot for slot in SLOTS if slot not in self.given]
        self.typed = {*self.varied, *self.given}
        base = ["picked.hardware=none", "tracking=none", f"trainer.accelerator={self.device}"]
        base += ["model.d_model=32", "model.n_layers=1", "model.n_heads=4", "model.n_kv_heads=2"]
        self.base = compose.load([*base, "model.head_dim=8", "model.ffn_dim=32", "train.steps=2"])
        self.usual = {slot: str(self.base[slot].name) for slot in SLOTS}
        OmegaConf.set_struct(self.base, False)
        self._sizes: dict[tuple[str, str], Sizes] = {}
        self._nodes: dict[tuple[str, str, Sizes], DictConfig] = {}
        self._placed: dict[str, DictConfig] = {}  # the nodes that self.base holds now

    def names(self, slot: str) -> list[str]:
        if slot in self.given:
            return list(self.given[slot])
        return registry.get().names(slot) if slot in self.varied else [self.usual[slot]]

    def combinations(self) -> Iterator[Combination]:
        """In the order of the slots; an attention that varies comes in each of its modes."""
        for chosen in itertools.product(*(self.names(slot) for slot in SLOTS)):
            names = dict(zip(SLOTS, chosen, strict=True))
            can = registry.get().component("attention", names["attention"]).capabilities
            modes = can.modes or ("",)
            for mode in modes if "attention" in self.typed else modes[-1:]:
                yield Combination(names, mode)

    def config(self, combination: Combination) -> DictConfig:
        """The composed and resolved configuration, as if all of it had been typed."""
        cfg, found = self.base, registry.get()
        sizes = self._granularity(combination)
        cfg.context, cfg.notes = sizes.length, []
        can = found.component("attention", combination.names["attention"]).capabilities
        cfg.model.head_dim = min(can.head_dims) if can.head_dims else 8
        for slot in SLOTS:
            node = self._node(slot, combination.names[slot], sizes)
            if self._placed.get(slot) is not node:
                cfg[slot], self._placed[slot] = node, node
        before = {slot: cfg[slot].name for slot in SLOTS}
        try:
            compose.resolve_slots(cfg, self.typed)
        finally:
            for slot in SLOTS:
                if cfg[slot].name != before[slot]:
                    del self._placed[slot]
        return cfg

    def _node(self, slot: str, name: str, sizes: Sizes) -> DictConfig:
        """The typed settings of a component; kept, since making them costs more than a forward."""
        if (slot, name, sizes) not in self._nodes:
            component = registry.get().component(slot, name)
            values = {**sizes.values(slot), **({"mode": sizes.mode} if sizes.mode else {})}
            values = {**fitting(component.config, values), **component.trial.small}
            node = OmegaConf.structured(component.config)
            for key, value in values.items():
                node[key] = value
            self._nodes[slot, name, sizes] = node
        return self._nodes[slot, name, sizes]

    def _granularity(self, combination: Combination) -> Sizes:
        key = combination.names["attention"], combination.mode
        if key not in self._sizes:
            self._sizes[key] = Case("attention", key[0], mode=key[1]).sizes
        return self._sizes[key]

    def outcome(self, combination: Combination) -> Outcome:
        """Compose, validate, build, and run one forward and backward."""
        start = time.perf_counter()
        try:
            cfg = self.config(combination)
            validate(cfg)
            torch.manual_seed(0)
            model = Transformer(cfg, VOCABULARY, registry.get()).to(self.device)
        except UserError as error:
            return Outcome(combination, REFUSED, first_reason(error), _since(start))
        except Exception as error:
            return Outcome(combination, BROKEN, _described("building", error), _since(start))
        try:
            wrong = _run(model, self.device)
        except Exception as error:
            wrong = _described("running", error)
        return Outcome(combination, BROKEN if wrong else WORKS, wrong, _since(start))

    def run(self, say: Callable[[Outcome], None] = lambda outcome: None) -> list[Outcome]:
        outcomes = []
        for combination in self.combinations():
            outcomes.append(self.outcome(combination))
            say(outcomes[-1])
        return outcomes


def _run(model: Transformer, device: str) -> str:
    """What is wrong with one forward and backward, or an empty string."""
    text = torch.randint(0, VOCABULARY, (2, TOKENS), device=device)
    out = model(text)
    loss = torch.stack([out.hidden_BTD.sin().mean(), *losses(out.reports)]).sum()
    if not bool(torch.isfinite(loss)):
        return f"running: the loss is {float(loss.detach())}"
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return f"running: the gradient of {name} is not finite"
    return ""


def first_reason(error: UserError) -> str:
    """The first problem of a message that may list several, on one line."""
    lines = str(error).splitlines()
    return lines[1].strip(" -") if len(lines) > 1 and lines[0].endswith(":") else lines[0]


def _described(what: str, error: Exception) -> str:
    return f"{what}: {type(error).__name__}: {' '.join(str(error).split())}"


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 4)
