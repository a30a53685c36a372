"""What kind of value a setting takes, in words, and whether a value is of that kind."""

from __future__ import annotations

import copy
import dataclasses
import typing
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gsa_platform.setting_checks import CHOICES

_WORDS = {
    int: ("a whole number", "whole numbers, such as [1,2]"),
    float: ("a number", "numbers, such as [0.9,0.95]"),
    bool: ("true or false", "true or false, such as [true,false]"),
    str: ("text", "texts, such as [a,b]"),
}


def misfit(config: DictConfig, key: str, value: Any) -> str:
    """``"needs a whole number (default 2048)"`` if the typed setting `key` cannot take `value`,
    else an empty string. The default is what `config` has."""
    trial = copy.deepcopy(config)
    OmegaConf.set_struct(trial, False)
    try:
        OmegaConf.update(trial, key, value, merge=True)
        return ""
    except (OmegaConfBaseException, ValueError, TypeError):
        pass
    parent_key, _, name = key.rpartition(".")
    parent: Any = OmegaConf.select(config, parent_key) if parent_key else config
    if name not in parent:  # an entry to be added to a mapping with a type
        return f"needs {_kind(key, parent._metadata.element_type)}"
    node = parent._get_node(name)
    text = f"needs {_kind(key, node._metadata.ref_type)}"
    if node._is_optional():
        text += ", or null"
    if not isinstance(node, DictConfig) and not node._is_missing():
        text += f" (default {as_typed(OmegaConf.select(config, key))})"
    if node._metadata.ref_type is int and isinstance(value, float) and value.is_integer():
        text += f". Type {key}={int(value)}"
    return text


def as_typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, list | tuple | ListConfig):
        return f"[{','.join(map(as_typed, value))}]"
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) or "''"


def _kind(key: str, kind: Any) -> str:
    if kind is str and key in CHOICES:
        return f"one of {', '.join(CHOICES[key])}"
    if kind in _WORDS:
        return _WORDS[kind][0]
    if typing.get_origin(kind) is list:
        return f"a list of {_WORDS.get(typing.get_args(kind)[0], ('', 'values'))[1]}"
    if dataclasses.is_dataclass(kind):
        names = ", ".join(field.name for field in dataclasses.fields(kind))
        return f"one of its parts, typed {key}.PART=VALUE: {names}"
    if typing.get_origin(kind) is dict:
        return f"named parts, each typed +{key}.NAME=VALUE"
    return "another kind of value"
