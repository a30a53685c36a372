"""Turns Hydra's composition errors into one message that names the choices."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gsa_platform import registry
from gsa_platform.components import SLOTS
from gsa_platform.errors import UserError, unknown
from gsa_platform.kinds import misfit

_DETAILS = ("full_key:", "object_type=", "reference_type=", "To append to", "See http")


def explain(error: Exception, overrides: list[str], sweep: bool = False) -> UserError:
    """Return a UserError for an error that composing ``overrides`` raised.

    Must run inside Hydra's global context, since it asks Hydra for groups and fields. Only in a
    ``sweep`` may a setting have several values.
    """
    if isinstance(error, YAMLError):
        return UserError(f"A configuration file cannot be read: {_texts(error)}")
    try:
        parsed = [parse(text) for text in overrides]
    except UserError as unreadable:
        return unreadable
    for override in parsed:
        if message := _bad_choice(override):
            return UserError(message)
    for override in parsed:
        if override.is_sweep_override() and not sweep:
            return UserError(_several(override))
    groups = _groups()
    base = _base([o for o in parsed if _key(o) in groups])
    if base is not None:
        for override in parsed:
            if message := refusal(override, base, groups):
                return UserError(message)
    return UserError(_experiment_conflict(error) or _file_value(error) or _texts(error))


def parse(text: str) -> Override:
    """Read ``key=value``; raises UserError if that is not what it is."""
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise UserError(
            f"Cannot read '{text}': settings are typed as key=value. Quote special characters "
            "twice, once for the shell: \"data.paths=['my text/*.txt']\""
        ) from error


def refusal(override: Override, base: DictConfig, groups: Sequence[str] = ()) -> str:
    """Why ``base`` cannot take an override: a key it does not have, a value of the wrong kind.

    An empty string if it can, or if the override chooses from one of ``groups``.
    """
    key = _key(override)
    if key.partition(".")[0] == "hydra" or key in groups:
        return ""
    return _bad_key(override, base, groups) or _bad_value(override, base)


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
    except (HydraException, OmegaConfBaseException, YAMLError):
        return None


def _bad_key(override: Override, base: DictConfig, groups: Sequence[str]) -> str:
    path = _key(override).split(".")
    node: Any = base
    for depth, part in enumerate(path):
        where = ".".join(path[:depth])
        if not isinstance(node, DictConfig):
            return f"'{where}' is a value, so '{_key(override)}' cannot be set."
        if part not in node:
            if OmegaConf.get_type(node) is dict:  # free names, but new ones are added
                last = depth == len(path) - 1
                if override.is_add() or override.is_force_add() or not last:
                    return ""
                return f"{where} has no '{part}' yet. Type +{override.input_line} to add it."
            if not where:
                return unknown("setting", part, {*map(str, node), *groups})
            if where in SLOTS:
                where = f"{where}={node.name}"
            return unknown(f"setting of {where}", part, map(str, node))
        node = None if node._is_missing() else node._get_node(part)
    return ""


def _bad_value(override: Override, base: DictConfig) -> str:
    key = _key(override)
    if override.is_delete():
        return f"{override.input_line}: a setting cannot be left out. Type {key}=VALUE."
    items = [override]
    if override.is_sweep_override():
        items = [parse(f"{key}={text}") for text in override.sweep_string_iterator()]
    for item in items:
        if message := misfit(base, key, item.value()):
            return f"{key}={item.get_value_string()}: {message}."
    return ""


def _several(override: Override) -> str:
    key, text = _key(override), override.get_value_string()
    return (
        f"{key}={text}: several values need a sweep. Add -m (--multirun) for one run per value, "
        f"or type a list: '{key}=[{text}]'."
    )


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


def _file_value(error: Exception) -> str:
    """A value of the wrong kind in a file."""
    where = re.search(r"In '(\S+)'(.|\s)*full_key: (\S+)", str(error))
    value = re.search(r"Value '(.*)' of type", str(error))
    base = _base([])
    if not where or base is None:
        return ""
    file, _, key = where.groups()
    wrong = misfit(base, key, value[1] if value else [[]])
    return f"'{file}' sets {key}{f'={value[1]}' if value else ''}: {wrong}." if wrong else ""


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
