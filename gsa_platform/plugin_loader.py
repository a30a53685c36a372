"""Finds plugins, loads them, and collects their components; a broken one never stops the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from gsa_platform.components import SLOTS, Entry, Plugin, check_component
from gsa_platform.errors import UserError, suggest
from gsa_platform.extensions import EXTENSIONS, check_extension
from gsa_platform.hookspecs import PLUGIN_API, PROJECT, Hooks

KINDS = (*SLOTS, *EXTENSIONS)


class PluginLoader:
    """Every plugin found, the components of those that loaded, and names offered twice."""

    def __init__(self, environ: dict[str, str] | None = None) -> None:
        environ = dict(os.environ) if environ is None else environ
        self.disabled = {n.strip() for n in environ.get("GSA_DISABLE_PLUGINS", "").split(",")}
        self.strict = environ.get("GSA_STRICT_PLUGINS", "") not in ("", "0")
        self.manager = pluggy.PluginManager(PROJECT)
        self.manager.add_hookspecs(Hooks)
        self.plugins: list[Plugin] = []
        self.entries: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}
        self.conflicts: list[str] = []

    def load_entry_points(
        self, distributions: Iterable[importlib.metadata.Distribution] | None = None
    ) -> None:
        """Load every entry point of the group; a broken one is recorded and the rest go on."""
        seen: set[str] = set()
        found = importlib.metadata.distributions() if distributions is None else distributions
        for distribution in found:
            dist_name = distribution.metadata["Name"] or "unknown"
            key = re.sub(r"[-_.]+", "-", dist_name).lower()
            if key in seen:  # the first on sys.path shadows the others, as for imports
                continue
            seen.add(key)
            for point in distribution.entry_points:
                if point.group == PROJECT:
                    plugin = Plugin(point.name, dist_name, distribution.version)
                    self._load(plugin, point.load)

    def load_path(self, path: str | Path) -> None:
        """Load a one-off plugin: a ``.py`` file, or every ``.py`` file of a folder."""
        path = Path(path).expanduser().resolve()
        if path.is_dir():
            for file in sorted(path.glob("[!_]*.py")):
                self.load_path(file)
            return
        if not path.is_file() or path.suffix != ".py":
            raise UserError(
                f"plugins_path: '{path}' is not a Python file or a folder of them.\n"
                "  Use plugins_path=./my_plugin.py, or set GSA_PLUGIN_PATH."
            )
        self._load(Plugin(path.stem, str(path), ""), lambda: _import_file(path))

    def _load(self, plugin: Plugin, load: Any) -> None:
        self.plugins.append(plugin)
        if plugin.name in self.disabled or plugin.distribution in self.disabled:
            plugin.status, plugin.reason = "disabled", "GSA_DISABLE_PLUGINS"
            return
        identity = f"{plugin.distribution}:{plugin.name}"
        try:
            module = load()
            _check_api(module)
            self.manager.register(module, identity)
            entries = self._collect(plugin, module)
            plugin.warnings = self._unknown_hooks(module)
            if self.strict and plugin.warnings:
                raise UserError("; ".join(plugin.warnings))
        except (Exception, SystemExit) as error:
            if self.manager.has_plugin(identity):
                self.manager.unregister(name=identity)
            if self.strict:
                raise UserError(
                    f"Plugin '{plugin.name}' from {plugin.distribution} failed to load: "
                    f"{describe(error)}\n  GSA_STRICT_PLUGINS is set, so this stops the program."
                ) from error
            plugin.status, plugin.reason = "broken", describe(error)
            return
        plugin.module = module
        for entry in entries:
            self._add(entry)

    def _collect(self, plugin: Plugin, module: Any) -> list[Entry]:
        entries = []
        for slot in KINDS:
            hook = getattr(self.manager.hook, f"gsa_register_{slot}")
            for impl in hook.get_hookimpls():
                if impl.plugin is module:
                    offered = impl.function()
                    for item in offered if isinstance(offered, list | tuple) else [offered]:
                        (check_component if slot in SLOTS else check_extension)(slot, item)
                        entries.append(Entry(slot, item, plugin))
        return entries

    def _unknown_hooks(self, module: Any) -> list[str]:
        known = [name for name in dir(Hooks) if name.startswith("gsa_")]
        return [
            f"unknown hook '{caller.name}' is never called.{suggest(caller.name, known)}"
            for caller in self.manager.get_hookcallers(module) or []
            if not caller.has_spec()
            and any(
                impl.plugin is module and not impl.optionalhook for impl in caller.get_hookimpls()
            )
        ]

    def _add(self, entry: Entry) -> None:
        name = entry.component.name
        other = self.entries[entry.slot].get(name)
        if other is None:
            self.entries[entry.slot][name] = entry
            return
        owners = [f"'{p.name}' from {p.distribution}" for p in (other.plugin, entry.plugin)]
        if entry.plugin is other.plugin:
            remedy = "Give one of them another name."
        else:
            names = [other.plugin.name, entry.plugin.name]
            if names[0] == names[1]:
                names = [other.plugin.distribution, entry.plugin.distribution]
            remedy = f"Turn one off: GSA_DISABLE_PLUGINS={names[0]} or ={names[1]}."
        self.conflicts.append(
            f"{entry.slot}={name} is offered twice: by plugin {' and by plugin '.join(owners)}.\n"
            f"  {remedy}"
        )
        if self.strict:
            raise UserError(self.conflicts[-1])


def _import_file(path: Path) -> ModuleType:
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    # `python -m` finds a file of the current folder by its name too: that is the same module.
    found = None if loaded is not None else importlib.util.find_spec(path.stem)
    same = found is not None and found.origin is not None and Path(found.origin) == path
    if loaded is not None or (found is not None and not same):
        raise UserError(f"the name '{path.stem}' is taken by another module; rename {path.name}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # targets such as "my_plugin:Class" import it by name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def _check_api(module: Any) -> None:
    wanted = getattr(module, "GSA_PLUGIN_API", PLUGIN_API)
    ours = ".".join(map(str, PLUGIN_API))
    if not (isinstance(wanted, tuple) and wanted and all(isinstance(n, int) for n in wanted)):
        raise UserError(f"GSA_PLUGIN_API must be a tuple such as {PLUGIN_API}, not {wanted!r}")
    if wanted[0] != PLUGIN_API[0] or wanted[1:] > PLUGIN_API[1:]:
        raise UserError(
            f"written for plugin API {'.'.join(map(str, wanted))}, this platform offers {ours}"
        )


def describe(error: BaseException) -> str:
    """An error in one line, with its type unless it speaks to the user already."""
    text = str(error).strip() or "no message"
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
