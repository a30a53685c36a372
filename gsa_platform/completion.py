"""Completion in bash: commands, groups and their choices, settings and their values.

    eval "$(gsa-platform --shell-completion install=bash)"

Hydra's own completion knows no commands and changes how bash splits words for every program.
"""

from __future__ import annotations

import os
import re
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gsa_platform.components import SLOTS
from gsa_platform.setting_checks import CHOICES, IMPLEMENTATIONS

SCRIPT = r"""_gsa_platform() {
    local line=${COMP_LINE:0:COMP_POINT} IFS=$'\n'
    local word=${line##* }
    COMPREPLY=($(COMP_LINE=$line "$1" --shell-completion query=bash 2>/dev/null))
    # Where bash splits words at '=', it replaces only what follows the last one.
    if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then
        COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*=}"}"}")
    fi
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=.] ]]; then compopt -o nospace; fi
}
complete -o default -F _gsa_platform gsa-platform
"""
FLAGS = ("--cfg", "--config-dir", "--help", "--info", "--multirun", "--version", "-m")
WORDS = {
    ("plugins",): ("check", "list", "matrix", "new", "show"),
    ("plugins", "check"): ("--slot", "--verbose"),
    ("plugins", "matrix"): ("--json", "--slot", *(f"{slot}=" for slot in SLOTS)),
    ("plugins", "new"): ("--folder", "--slot"),
    ("runs",): ("doctor", "list"),
    ("runs", "list"): ("output_root=",),
    ("runs", "doctor"): ("--fix", "output_root="),
}


def run(arguments: list[str]) -> int:
    """Print the script (``install=bash``), or the candidates for $COMP_LINE (``query=bash``)."""
    if "install=bash" in arguments:
        print(SCRIPT, end="")
    else:
        print("\n".join(candidates(os.environ.get("COMP_LINE", ""))))
    return 0


def candidates(line: str) -> list[str]:
    """What may stand in place of the last word of a command line."""
    *before, word = re.split(r"\s+", line.lstrip())
    before = before[1:]
    return sorted(c for c in _offered(before, word) if c.startswith(word))


def _offered(before: list[str], word: str) -> list[str]:
    from gsa_platform.cli import COMMANDS

    command = before[0] if before and before[0] in COMMANDS else ""
    rest = before[1:] if command else before
    if command == "help":
        return []
    if command == "bench":
        return _benchmark(rest)
    if (command, *rest[:1]) in WORDS or command in ("plugins", "runs"):
        if before[-1:] == ["--slot"]:
            return list(SLOTS)
        if (command, *rest) in (("plugins", "show"), ("plugins", "check")):
            from gsa_platform import registry

            found = registry.get()
            return [name for slot in SLOTS for name in found.names(slot)]
        return list(WORDS.get((command, *rest[:1]), ()))
    if before[-1:] == ["--cfg"]:
        return ["all", "hydra", "job"]
    if word.startswith("-"):
        return list(FLAGS) if command in ("", "train") else []
    own = {"": list(COMMANDS) if not before else [], "eval": ["checkpoint="]}
    return own.get(command, []) + _settings([w for w in rest if "=" in w], word)


def _benchmark(typed: list[str]) -> list[str]:
    """Benchmarks, then the options of one and their values."""
    from gsa_platform import registry
    from gsa_platform.bench.options import choices, flags

    found = registry.get()
    if not typed:
        return found.names("benchmark")
    if typed[0] not in found.names("benchmark"):
        return []
    config = found.component("benchmark", typed[0]).config
    return [*choices(config, typed[-1]), *flags(config)]


def _settings(typed: list[str], word: str) -> list[str]:
    """Groups, settings, and values after an equals sign."""
    from gsa_platform import compose

    groups = compose.choices()
    key, equals, values = word.partition("=")
    if equals:
        # Of several values for a sweep, the last.
        done = f"{key}={values[: values.rfind(',') + 1]}"
        if key in groups:
            return [done + choice for choice in groups[key]]
        return [done + value for value in _values(key, _config(typed, groups))]
    parent, dot, _ = word.rpartition(".")
    config = _config(typed, groups)
    node = OmegaConf.select(config, parent) if dot else config
    if not isinstance(node, DictConfig):
        return []
    found = [f"{group}=" for group in groups] if not dot else []
    for name in map(str, node):
        if parent in SLOTS and name == "name":
            continue  # is chosen as the group
        child = None if OmegaConf.is_missing(node, name) else node._get_node(name)
        found.append(f"{parent}{dot}{name}{'.' if isinstance(child, DictConfig) else '='}")
    return found


def _config(typed: list[str], groups: dict[str, list[str]]) -> DictConfig:
    """The configuration with the groups that were typed, as far as they are good choices."""
    from hydra import compose as hydra_compose

    from gsa_platform import compose

    pairs = [word.split("=", 1) for word in typed]
    chosen = [f"{key}={value}" for key, value in pairs if value in groups.get(key, ())]
    with compose.hydra_context():
        return hydra_compose(compose.CONFIG_NAME, overrides=chosen)


def _values(key: str, config: DictConfig) -> tuple[str, ...]:
    if key in CHOICES:
        return CHOICES[key]
    if key == "attention.impl":
        return IMPLEMENTATIONS
    if key == "attention.mode":
        from gsa_platform import registry

        return registry.get().component("attention", config.attention.name).capabilities.modes
    value: Any = OmegaConf.select(config, key)
    return ("true", "false") if isinstance(value, bool) else ()
