"""``plugins ...``: what is installed, whether it works, how to use it, and how to add to it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from itertools import pairwise
from typing import Any

from gsa_platform import hardware, registry
from gsa_platform.capabilities import because
from gsa_platform.components import DEPENDENT, SLOTS, Component, Entry, Plugin
from gsa_platform.errors import UserError, unknown
from gsa_platform.plugin_loader import KINDS
from gsa_platform.registry import Registry

SELECTION_ONLY = ("mass", "bias")
USAGE = """\
Usage: gsa-platform plugins list
       gsa-platform plugins show NAME
       gsa-platform plugins check NAME [--slot SLOT] [setting=value ...]
       gsa-platform plugins matrix [--slot SLOT] [slot=NAME,NAME ...] [--json]
       gsa-platform plugins new NAME --slot SLOT [--folder FOLDER]"""
COMMANDS = ("list", "show", "check", "matrix", "new")


def run(arguments: list[str]) -> int:
    """Run a ``plugins`` command and return its exit code; raises UserError for anything else."""
    paths = [text for text in arguments if text.startswith("plugins_path=")]
    command, *rest = [text for text in arguments if text not in paths] or ["list"]
    if paths:
        from gsa_platform import compose

        compose.prepare(paths)
    if command == "check":
        from gsa_platform.testing.command import check

        return check(rest)
    if command == "matrix":
        from gsa_platform.testing.matrix_command import matrix

        return matrix(rest)
    if command == "new":
        from gsa_platform.scaffold import new

        return new(rest)
    found = registry.get()
    if command == "list" and not rest:
        print(list_text(found))
    elif command == "show" and len(rest) == 1:
        print(show_text(found, rest[0]))
    elif command in COMMANDS:
        raise UserError(USAGE)
    else:
        raise UserError(f"{unknown('plugins command', command, COMMANDS)}\n  {USAGE}")
    return 0


def list_text(found: Registry) -> str:
    """Return a table of components, then plugins that are off or broken, then conflicts."""
    rows = [("slot", "name", "distribution", "version", "status", "summary")]
    for slot in KINDS:
        for name in found.names(slot):
            entry = found.entries[slot][name]
            reason = _reason(entry)
            status = f"unavailable: {reason}" if reason else "ok"
            rows.append((slot, name, *_source(entry.plugin), status, entry.component.summary))
    for plugin in found.plugins:
        if plugin.status != "ok":
            status = f"{plugin.status}: {plugin.reason}"
            rows.append(("(plugin)", plugin.name, *_source(plugin), status, ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    widths.append(min(40, max(len(row[4]) for row in rows)))
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, [*widths, 0])).rstrip() for row in rows]
    return "\n".join([*lines, *(f"conflict: {text}" for text in found.conflicts)])


def show_text(found: Registry, name: str) -> str:
    """Return the description of every component called ``name`` (or ``slot=name``), or of the
    plugin of that name; raises UserError with the choices."""
    slot, equals, rest = name.partition("=")
    if equals:
        return _component_text(found.entry(slot, rest))
    entries = [found.entries[s][name] for s in KINDS if name in found.entries[s]]
    if entries:
        return "\n\n".join(_component_text(entry) for entry in entries)
    for plugin in found.plugins:
        if name in (plugin.name, plugin.distribution):
            return _plugin_text(found, plugin)
    known = {n for s in KINDS for n in found.names(s)} | {p.name for p in found.plugins}
    raise UserError(unknown("component or plugin", name, known) + found.broken_text(name))


def _source(plugin: Plugin) -> tuple[str, str]:
    return plugin.distribution, plugin.version or "-"


def _plugin_text(found: Registry, plugin: Plugin) -> str:
    distribution, version = _source(plugin)
    lines = [f"plugin {plugin.name}", f"  from           {distribution} {version}"]
    lines.append(f"  status         {plugin.status}{f': {plugin.reason}' * bool(plugin.reason)}")
    for slot in KINDS:
        names = [n for n in found.names(slot) if found.entries[slot][n].plugin is plugin]
        if names:
            lines.append(f"  {slot:<14} {', '.join(names)}")
    return "\n".join([*lines, *(f"  warning        {warning}" for warning in plugin.warnings)])


def _component_text(entry: Entry) -> str:
    component, slot = entry.component, entry.slot
    distribution, version = _source(entry.plugin)
    reason = _reason(entry)
    lines = [
        f"{slot}={component.name}",
        f"  {component.summary}" if component.summary else "",
        f"  from          {distribution} {version}, plugin {entry.plugin.name}",
        f"  status        {f'unavailable: {reason}' if reason else 'ok'}",
        f"  target        {component.target or '(nothing is built)'}",
    ]
    if component.target and slot in SLOTS:
        lines.append(f"  capabilities  {_capabilities(component, slot)}")
    for name, reason in component.capabilities.reasons.items():
        lines.append(f"  {name:<13} {reason}")
    lines += [f"  {'here':<13} {line}" for line in _details(entry)]
    settings = [f for f in dataclasses.fields(component.config) if f.name != "name"]
    if settings:
        comments = field_comments(component.config)
        prefixes = {"callback": f"callbacks.{component.name}.", "benchmark": ""}
        prefix = prefixes.get(slot, f"{slot}.")
        rows = [(f"{prefix}{f.name}={_default(f)}", comments.get(f.name, "")) for f in settings]
        width = max(len(row[0]) for row in rows)
        lines.append("  settings and defaults")
        lines += [f"    {text.ljust(width)}  {comment}".rstrip() for text, comment in rows]
    lines.append(f"  example       {_example(entry, settings)}")
    return "\n".join(line for line in lines if line)


def _example(entry: Entry, settings: list[dataclasses.Field[object]]) -> str:
    slot, name = entry.slot, entry.component.name
    run = "gsa-platform experiment=gsa_128k"
    if slot == "eval_task":
        return f"gsa-platform eval checkpoint=PATH task={name}"
    if slot == "benchmark":
        return f"gsa-platform bench {name}"
    if slot == "report_section":
        return "(in the closing summary of every run)"
    if slot == "callback":
        return f"{run} callbacks.{name}.enabled=true"
    if name == "none" and slot in DEPENDENT:
        return f"{run} attention=dense"
    if slot == "data":
        return f"{run} data={name}"
    first = f" {slot}.{settings[0].name}={_default(settings[0])}" if settings else ""
    return f"{run} {slot}={name}{first}"


def _reason(entry: Entry) -> str:
    """Why this machine cannot run a component; empty if it can."""
    can, kind = entry.component.capabilities, hardware.detect().kind
    if (reason := entry.unavailable()) or kind in can.devices:
        return reason
    return f"needs {' or '.join(can.devices)}, this machine has {kind}{because(can, 'devices')}"


def _details(entry: Entry) -> list[str]:
    """What the component itself says of this machine."""
    module, _, function = entry.component.details.partition(":")
    if not module or entry.unavailable():
        return []
    try:
        return [str(line) for line in getattr(importlib.import_module(module), function)()]
    except Exception as error:  # it looks at drivers and extensions, and must not hide the rest
        return [f"cannot tell: {type(error).__name__}: {error}"]


def _capabilities(component: Component, slot: str) -> str:
    parts = []
    takes_selection = slot == "attention" and component.capabilities.modes
    for field in dataclasses.fields(component.capabilities):
        value = getattr(component.capabilities, field.name)
        if field.name == "requires":
            parts += [_requirement(slot, need, setting) for need, setting in value.items()]
        elif field.name == "reasons" or (field.name in SELECTION_ONLY and not takes_selection):
            continue
        elif field.name == "fused_gate" and slot != "attention":
            continue
        elif isinstance(value, bool):
            parts.append(field.name if value else f"no {field.name}")
        elif value:
            parts.append(f"{field.name} {_values(value)}")
    return ", ".join(parts)


def _values(values: tuple[Any, ...]) -> str:
    """Separated by slashes; a longer arithmetic series by its ends."""
    if len(values) > 4 and all(isinstance(v, int) for v in values):
        steps = {b - a for a, b in pairwise(values)}
        if len(steps) == 1:
            return f"{values[0]} to {values[-1]} by {steps.pop()}"
    return "/".join(map(str, values))


def _requirement(slot: str, need: str, setting: str) -> str:
    return f"needs an attention with {need}" + f" if {slot}.{setting}=true" * bool(setting)


def _default(field: dataclasses.Field[object]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "?"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def field_comments(config: type) -> dict[str, str]:
    """Return the trailing comment of each field of a dataclass whose source is known."""
    comments: dict[str, str] = {}
    for cls in reversed(config.__mro__[:-1]):
        try:
            source = inspect.getsource(cls)
        except (OSError, TypeError):
            continue
        for match in re.finditer(r"^\s+(\w+)\s*:[^#\n]*#\s*(.+)$", source, re.MULTILINE):
            comments[match.group(1)] = match.group(2)
    return comments
