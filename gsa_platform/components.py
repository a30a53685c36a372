"""The records of plugins: slots, components with what they can do, and who offers them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from gsa_platform.errors import UserError
from gsa_platform.trial import Trial

SLOTS = ("attention", "indexer", "sparsity", "gate", "objective")
DEPENDENT = ("indexer", "sparsity", "objective")  # empty where attention sees every key
BEFORE = "before"  # in the metadata of a setting: see `added`


@dataclass(frozen=True)
class Capabilities:
    """What a component can do. Empty ``head_dims`` means any; empty ``modes`` means that an
    attention takes no Selection: it decides by itself which keys a query attends.

    ``mass`` and ``bias``, for attentions that take a Selection: it reports the attention on each
    selected block, and adds a bias to the logits of each. ``fused_gate``: an attention takes the
    keyword ``gate`` and multiplies its output by it. ``requires`` names capabilities that
    the attention beside this component must have, each with the setting that asks for it ("" for
    always). ``reasons`` says why a capability is missing or narrow; refusals quote it."""

    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    head_dims: tuple[int, ...] = ()
    modes: tuple[str, ...] = ()
    backward: bool = True
    decode: bool = True
    varlen: bool = True
    deterministic: bool = True
    mass: bool = False
    bias: bool = False
    fused_gate: bool = False
    needs: tuple[str, ...] = ()
    requires: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Component:
    """One named choice for a slot. ``target`` is ``"package.module:Class"``, imported only when
    the component is built; ``config`` is a dataclass whose ``name`` field defaults to ``name``.
    ``details`` is ``"package.module:function"``; ``plugins show`` prints the lines it returns
    about this machine. ``trial`` says how the contract kit tries it (gsa_platform.testing)."""

    name: str
    target: str
    config: type
    summary: str = ""
    capabilities: Capabilities = Capabilities()
    details: str = ""
    trial: Trial = field(default_factory=Trial)


def added(default: Any, before: Any) -> Any:
    """The default of a setting that a component did not always have. A checkpoint without it is
    read with `before`, what the component did then, and not resumed with another value."""
    return field(default=default, metadata={BEFORE: before})


@dataclass
class Plugin:
    """A plugin that was found, whether or not it could be loaded."""

    name: str
    distribution: str
    version: str
    status: str = "ok"  # ok, disabled or broken
    reason: str = ""
    module: ModuleType | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Entry:
    """A component with its slot and the plugin that offers it."""

    slot: str
    component: Component
    plugin: Plugin

    def unavailable(self) -> str:
        """Return why the component cannot run here, or an empty string."""
        missing = [n for n in self.component.capabilities.needs if not _installed(n)]
        return f"needs {', '.join(missing)} (pip install {' '.join(missing)})" if missing else ""


def check_component(slot: str, item: Any) -> None:
    """Raise UserError if what a registration hook returned is no proper record."""
    where = f"gsa_register_{slot}"
    if not isinstance(item, Component):
        raise UserError(f"{where} must return Component records, not {type(item).__name__}")
    if not (isinstance(item.config, type) and dataclasses.is_dataclass(item.config)):
        raise UserError(f"{where}: config of '{item.name}' must be a dataclass type")
    names = [f.default for f in dataclasses.fields(item.config) if f.name == "name"]
    if names != [item.name]:
        raise UserError(
            f'{where}: {item.config.__name__} needs a field  name: str = "{item.name}"'
        )
    if item.target and not re.fullmatch(r"[\w.]+:\w+", item.target):
        raise UserError(f"{where}: target '{item.target}' must look like 'package.module:Class'")


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
        return True
    except importlib.metadata.PackageNotFoundError:
        return importlib.util.find_spec(name.partition(".")[0].replace("-", "_")) is not None
