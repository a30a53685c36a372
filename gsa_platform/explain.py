"""Turns Hydra's composition errors into one message that names the choices."""

from __future__ import annotations

import re
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from gsa_platform import registry
from gsa_platform.components import SLOTS
from gsa_platform.errors import UserError, unknown

_DETAILS = ("full_key:", "object_type=", "reference_type=", "To append to", "See http")


def explain(error: Exception, overrides: list[str]) -> UserError:
    """Return a UserError for an error that composing ``overrides`` raised.

    Must run inside Hydra's global context, since it asks Hydra for groups and fields.
    """
    parsed = []
    for text in overrides:
        try:
            parsed.append(OverridesParser.create().parse_override(text))
        except HydraException:
            return UserError(
                f"Cannot read '{text}': settings are typed as key=value. Quote special characters "
                "twice, once for the shell: \"data.paths=['my text/*.txt']\""
            )
    for override in parsed:
        if message := _bad_choice(override):
            return UserError(message)
    groups = _groups()
    base = _base([o for o in parsed if _key(o) in groups])
    if base is not None:
        for override in parsed:
            if message := _bad_key(override, base, groups):
                return UserError(message)
    return UserError(_experiment_conflict(error) or _texts(error))


def _key(override: Override) -> str:
    return str(override.key_or_group).partition("@")[0]


def _groups() -> list[str]:
    loader = GlobalHydra.instance().config_loader()
    return [group for group in loader.list_groups("") if group != "hydra"]


def _bad_choice(override: Override) -> str:
    key = _key(override)
    if override.is_delete() or key not in _groups():
        return ""
    options = GlobalHydra.instance().config_loader().get_group_options(key)
    value = override.value()
    if isinstance(value, list):
        return ""
    values = override.sweep_string_iterator() if override.is_sweep_override() else [value]
    for name in ("null" if v is None else str(v) for v in values):
        if name in options:
            continue
        message = unknown(key, name, options)
        if key in SLOTS or key == "experiment":
            message += registry.get().broken_text(name)
        return message
    return ""


def _base(group_overrides: list[Override]) -> DictConfig | None:
    """The configuration without the typed values, or None if even that does not compose."""
    lines = [o.input_line for o in group_overrides if o.input_line and not o.is_sweep_override()]
    try:
        return compose("config", overrides=lines)
    except (HydraException, OmegaConfBaseException):
        return None


def _bad_key(override: Override, base: DictConfig, groups: list[str]) -> str:
    path = _key(override).split(".")
    if path[0] == "hydra" or _key(override) in groups:
        return ""
    node: Any = base
    for depth, part in enumerate(path):
        where = ".".join(path[:depth])
        if not isinstance(node, DictConfig):
            return f"'{where}' is a value, so '{_key(override)}' cannot be set."
        if part not in node:
            if not where:
                return unknown("setting", part, {*map(str, node), *groups})
            if where in SLOTS:
                where = f"{where}={node.name}"
            return unknown(f"setting of {where}", part, map(str, node))
        node = None if node._is_missing() else node._get_node(part)
    return ""


def _experiment_conflict(error: Exception) -> str:
    """An experiment's own component settings do not fit a component chosen in its place."""
    found = re.search(r"In '(\S+)'.*\s+Key '(\w+)' not in '(\w+)'\s+full_key: (\S+)", str(error))
    if not found:
        return ""
    file, _, owner, key = found.groups()
    slot = key.partition(".")[0]
    message = f"'{file}' sets {key}, which {owner} does not have."
    if slot in SLOTS:
        message += (
            f"\n  Leave {slot} as the file has it, or move its settings of {slot} to a preset "
            f"conf/{slot}/NAME.yaml that the file chooses by name."
        )
    return message


def _texts(error: BaseException | None) -> str:
    """The messages of an exception and its causes, without OmegaConf's type details."""
    lines: list[str] = []
    while error is not None:
        for line in str(error).splitlines():
            line = line.strip()
            detail = line.startswith(_DETAILS)
            if line and not detail and line not in lines:
                lines.append(line)
        error = error.__cause__
    return "\n  ".join(lines)
