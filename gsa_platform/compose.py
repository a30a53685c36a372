"""From typed overrides to the resolved configuration: presets for this machine, and slots that a
dense attention leaves empty. Everything decided here is told in ``cfg.notes``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gsa_platform import config, hardware, registry, searchpath
from gsa_platform.components import DEPENDENT, SLOTS
from gsa_platform.errors import UserError, unknown
from gsa_platform.explain import explain

CONF_MODULE = "gsa_platform.conf"
CONFIG_NAME = "config"
ERRORS = (HydraException, OmegaConfBaseException, YAMLError)


def prepare(overrides: Sequence[str] = ()) -> registry.Registry:
    """Load the plugins (also those of a ``plugins_path=`` override) and register with Hydra."""
    for override in overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+") == "plugins_path" and value not in ("", "null"):
            value = value.strip("'\"")
            paths = [str(Path(p).expanduser().resolve()) for p in value.split(os.pathsep) if p]
            before = os.environ.get("GSA_PLUGIN_PATH", "").split(os.pathsep)
            # The environment, because workers load plugins before they read a config.
            os.environ["GSA_PLUGIN_PATH"] = os.pathsep.join(
                dict.fromkeys(p for p in (*before, *paths) if p)
            )
            registry.reset()
    found = registry.get()
    found.require_no_conflicts()
    config.register(found)
    return found


def load(overrides: Sequence[str] = ()) -> DictConfig:
    """Compose and resolve the configuration for a list of ``key=value``.

    Raises UserError for anything that cannot be composed; validation is a separate step.
    """
    overrides = list(overrides)
    prepare(overrides)
    with hydra_context():
        return resolve(overrides)


@contextlib.contextmanager
def hydra_context(folders: Sequence[str] = ()) -> Iterator[None]:
    """Enter Hydra's global state with our configuration module, unless it is entered already.

    ``folders`` are searched for YAML too.
    """
    if GlobalHydra.instance().is_initialized():
        yield
        return
    searchpath.FOLDERS[:] = folders
    with initialize_config_module(CONF_MODULE, version_base="1.3", job_name="gsa_platform"):
        yield


def resolve(overrides: Sequence[str]) -> DictConfig:
    """Compose inside ``hydra_context``: presets first, then what was typed, then the slots."""
    typed = list(overrides)
    cfg = _compose(typed, typed)
    parsed = OverridesParser.create().parse_overrides(typed)
    keys = {_key(o) for o in parsed}
    for slot in SLOTS:  # the settings of the node are those of the component that was chosen
        if f"{slot}.name" in keys:
            raise UserError(f"{slot}.name cannot be set. Type {slot}={cfg[slot].name}.")
    _refuse_unknown_additions(cfg, parsed)
    preset, note = _pick_preset(cfg, keys)
    if preset["overrides"]:
        cfg = _compose([*preset["overrides"], *typed], typed)
    with _writable(cfg):
        cfg.picked = config.PickedConfig(**preset)
        if note:
            cfg.notes.append(note)
        resolve_slots(cfg, keys)
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:  # of an interpolation
        raise UserError(f"{error.full_key}: {str(error).partition(chr(10))[0]}") from error
    if missing:
        raise UserError(f"No value for {', '.join(missing)}. Add {missing[0]}=VALUE.")
    return cfg


def choices() -> dict[str, list[str]]:
    """Return every configuration group with its options, components of plugins included."""
    prepare()
    with hydra_context():
        loader = GlobalHydra.instance().config_loader()
        groups = [g for g in loader.list_groups("") if g != "hydra"]
        return {group: list(loader.get_group_options(group)) for group in groups}


def _compose(overrides: list[str], typed: list[str]) -> DictConfig:
    try:
        return compose(CONFIG_NAME, overrides=overrides)
    except (*ERRORS, ValueError) as error:  # ValueError: group=null
        raise explain(error, typed) from error


def _key(override: Override) -> str:
    return str(override.key_or_group).partition("@")[0]


@contextlib.contextmanager
def _writable(cfg: DictConfig) -> Iterator[None]:
    was_struct = OmegaConf.is_struct(cfg)
    OmegaConf.set_struct(cfg, False)
    try:
        yield
    finally:
        OmegaConf.set_struct(cfg, was_struct)


def _refuse_unknown_additions(cfg: DictConfig, parsed: list[Override]) -> None:
    """``+key=value`` at the root invents a key that nothing reads: most likely a typo."""
    roots = set(config.RootConfig.__dataclass_fields__)
    groups = set(GlobalHydra.instance().config_loader().list_groups(""))
    for override in parsed:
        path = _key(override).split(".")
        if not (override.is_add() or override.is_force_add()) or path[0] == "hydra":
            continue
        if path[0] not in roots | groups:
            raise UserError(unknown("setting", path[0], roots))
        node: Any = cfg
        for part in path[:-1]:
            node = node.get(part) if isinstance(node, DictConfig) else None
        node_type = OmegaConf.get_type(node) if isinstance(node, DictConfig) else None
        fields = getattr(node_type, "__dataclass_fields__", None)
        if fields is not None and path[-1] not in fields:
            raise UserError(unknown(f"setting of {'.'.join(path[:-1])}", path[-1], fields))


def _pick_preset(cfg: DictConfig, typed_keys: set[str]) -> tuple[dict[str, Any], str]:
    nothing = {"hardware": "", "reason": "", "overrides": []}
    classes = list(cfg.hardware)
    if not classes:
        return nothing, ""
    chosen = cfg.picked.hardware
    if chosen == "none":
        return {**nothing, "hardware": "none", "reason": "picked.hardware=none"}, ""
    if chosen:
        if chosen not in classes:
            raise UserError(unknown("picked.hardware", chosen, [*classes, "none"]))
        reason = f"picked.hardware={chosen}"
    else:
        machine = hardware.detect()
        if cfg.trainer.accelerator == "cpu" and machine.kind != "cpu":
            machine = hardware.Hardware(
                "cpu", "CPU", 1, machine.ram_gb, machine.cores, machine.ram_gb
            )
        chosen, reason = hardware.pick(classes, machine)
        if cfg.trainer.accelerator == "cpu":
            reason = reason.replace("found no GPU", "accelerator=cpu")
    if not chosen:
        return {**nothing, "reason": reason}, f"hardware preset: none ({reason})"
    overrides = []
    for text in cfg.hardware[chosen]:
        override = _parse_preset(text, chosen)
        if _key(override) not in typed_keys and _fits(cfg, _key(override)):
            overrides.append(text)
    note = f"hardware preset: {chosen} ({reason}): {' '.join(overrides) or 'nothing left to set'}"
    return {"hardware": chosen, "reason": reason, "overrides": overrides}, note


def _parse_preset(text: str, chosen: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise UserError(f"hardware.{chosen}: cannot read the override '{text}'") from error


def _fits(cfg: DictConfig, key: str) -> bool:
    """A preset's ``sparsity.k=...`` does not apply once another component has the slot."""
    slot, _, name = key.partition(".")
    return slot not in SLOTS or not name or name.partition(".")[0] in cfg[slot]


def resolve_slots(cfg: DictConfig, typed_keys: set[str]) -> None:
    """Empty the slots that the attention has no use for, and note it; raises UserError where such
    a slot was typed, or where a slot it cannot do without is empty."""
    found = registry.get()
    name = cfg.attention.name
    if found.component("attention", name).capabilities.modes:
        for slot in ("indexer", "sparsity"):
            if cfg[slot].name == "none":
                usual = [n for n in found.names(slot) if n != "none"]
                raise UserError(
                    f"attention={name} attends to selected keys, so it needs the slot {slot}, "
                    f"but {slot}=none.\n  Use {slot}={' or '.join(usual)}, or attention=dense."
                )
        return
    emptied = []
    sparse = [n for n in found.names("attention") if _is_sparse(found, n)]
    for slot in DEPENDENT:
        if cfg[slot].name == "none":
            continue
        explicit = sorted(k for k in typed_keys if k == slot or k.startswith(f"{slot}."))
        if explicit:
            raise UserError(
                f"attention={name} takes no selection, so {slot}={cfg[slot].name} would do "
                f"nothing (you set {', '.join(explicit)}).\n"
                f"  Leave {slot} out, or use attention={' or '.join(sparse) or '(a sparse one)'}."
            )
        cfg[slot] = OmegaConf.structured(found.component(slot, "none").config)
        emptied.append(slot)
    if emptied:
        cfg.notes.append(
            f"attention={name} takes no selection: {' '.join(f'{s}=none' for s in emptied)}"
        )


def _is_sparse(found: registry.Registry, name: str) -> bool:
    return bool(found.component("attention", name).capabilities.modes)
