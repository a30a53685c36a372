"""Plugins and the components they offer: loaded from entry points, looked up by slot and name."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from gsa_platform.errors import UserError, suggest, unknown
from gsa_platform.hookspecs import PLUGIN_API, PROJECT, Hooks
from gsa_platform.trial import Trial

SLOTS = ("attention", "indexer", "sparsity", "gate", "objective")
DEPENDENT = ("indexer", "sparsity", "objective")  # empty where attention sees every key


@dataclass(frozen=True)
class Capabilities:
    """What a component can do. Empty ``head_dims`` means any; empty ``modes`` means that an
    attention attends to every key and takes no Selection."""

    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    head_dims: tuple[int, ...] = ()
    modes: tuple[str, ...] = ()
    backward: bool = True
    decode: bool = True
    varlen: bool = True
    deterministic: bool = True
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Component:
    """One named choice for a slot. ``target`` is ``"package.module:Class"``, imported only when
    the component is built; ``config`` is a dataclass whose ``name`` field defaults to ``name``.
    ``trial`` says how the contract kit tries it (gsa_platform.testing)."""

    name: str
    target: str
    config: type
    summary: str = ""
    capabilities: Capabilities = Capabilities()
    trial: Trial = field(default_factory=Trial)


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


class Registry:
    """Every plugin found, and every component of those that loaded."""

    def __init__(self, environ: dict[str, str] | None = None) -> None:
        environ = dict(os.environ) if environ is None else environ
        self.disabled = {n.strip() for n in environ.get("GSA_DISABLE_PLUGINS", "").split(",")}
        self.strict = environ.get("GSA_STRICT_PLUGINS", "") not in ("", "0")
        self.manager = pluggy.PluginManager(PROJECT)
        self.manager.add_hookspecs(Hooks)
        self.plugins: list[Plugin] = []
        self.entries: dict[str, dict[str, Entry]] = {slot: {} for slot in SLOTS}
        self.conflicts: list[str] = []

    # Loading

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
                    f"{_describe(error)}\n  GSA_STRICT_PLUGINS is set, so this stops the program."
                ) from error
            plugin.status, plugin.reason = "broken", _describe(error)
            return
        plugin.module = module
        for entry in entries:
            self._add(entry)

    def _collect(self, plugin: Plugin, module: Any) -> list[Entry]:
        entries = []
        for slot in SLOTS:
            hook = getattr(self.manager.hook, f"gsa_register_{slot}")
            for impl in hook.get_hookimpls():
                if impl.plugin is module:
                    offered = impl.function()
                    for item in offered if isinstance(offered, list | tuple) else [offered]:
                        _check_component(slot, item)
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

    # Looking up

    def component(self, slot: str, name: str) -> Component:
        """Return the component, or raise UserError with the choices and any broken plugin."""
        return self.entry(slot, name).component

    def entry(self, slot: str, name: str) -> Entry:
        """Return the component with its plugin; raises UserError like ``component``."""
        if slot not in SLOTS:
            raise UserError(unknown("slot", slot, SLOTS))
        if name not in self.entries[slot]:
            raise UserError(unknown(slot, name, self.names(slot)) + self.broken_text(name))
        return self.entries[slot][name]

    def names(self, slot: str) -> list[str]:
        """Return the component names of a slot, sorted."""
        return sorted(self.entries[slot])

    def broken_text(self, name: str = "") -> str:
        """Return lines on plugins that are off or broken, since one of them may offer a name."""
        lines = []
        for plugin in self.plugins:
            if plugin.status == "broken":
                verb = "offers" if plugin.name == name else "may offer"
                lines.append(
                    f"\n  Plugin '{plugin.name}' from {plugin.distribution} {verb} it but failed "
                    f"to load: {plugin.reason}"
                )
            elif plugin.status == "disabled":
                lines.append(f"\n  Plugin '{plugin.name}' is turned off by {plugin.reason}.")
        return "".join(lines)

    def require_no_conflicts(self) -> None:
        """Raise UserError if two plugins offer the same component."""
        if self.conflicts:
            raise UserError("\n".join(self.conflicts))

    def build(self, slot: str, node: Any, dims: Any) -> Any:
        """Import and construct the component that ``node.name`` names.

        ``node`` is a mapping or OmegaConf node, retyped to the component's dataclass. Returns
        ``cls(config, dims)``, or None for a component without a target (``none``).
        """
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        entry = self.entry(slot, node["name"])
        component = entry.component
        if not component.target:
            return None
        if reason := entry.unavailable():
            raise UserError(f"{slot}={component.name} cannot run here: {reason}.")
        try:
            config = OmegaConf.to_object(
                OmegaConf.merge(OmegaConf.structured(component.config), node)
            )
        except OmegaConfBaseException as error:
            raise UserError(f"{slot}={component.name}: {error}") from error
        module_name, _, attribute = component.target.partition(":")
        try:
            cls = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"{slot}={component.name}: plugin '{entry.plugin.name}' names the class "
                f"'{component.target}', which cannot be imported: {_describe(error)}"
            ) from error
        try:
            return cls(config, dims)
        except UserError:
            raise
        except ValueError as error:  # a setting that the component refuses
            raise UserError(f"{slot}={component.name}: {error}") from error


_REGISTRY: Registry | None = None


def get(plugins_path: str | None = None) -> Registry:
    """Return the process-wide registry, loading every plugin on the first call.

    ``plugins_path`` (or GSA_PLUGIN_PATH) lists one-off files or folders, separated by os.pathsep.
    Problems are printed to stderr once, and not again by child processes.
    """
    global _REGISTRY
    if _REGISTRY is None:
        registry = Registry()
        registry.load_entry_points()
        paths = [os.environ.get("GSA_PLUGIN_PATH", ""), plugins_path or ""]
        files = [p for joined in paths for p in joined.split(os.pathsep) if p]
        for path in dict.fromkeys(str(Path(p).expanduser().resolve()) for p in files):
            registry.load_path(path)
        _report(registry)
        _REGISTRY = registry
    return _REGISTRY


def reset() -> None:
    """Forget the process-wide registry, so that the next ``get`` loads the plugins again."""
    global _REGISTRY
    _REGISTRY = None


def build(slot: str, node: Any, dims: Any) -> Any:
    """Build a component with the process-wide registry; see ``Registry.build``."""
    return get().build(slot, node, dims)


def _report(registry: Registry) -> None:
    lines = []
    for plugin in registry.plugins:
        if plugin.status == "broken":
            lines.append(
                f"plugin '{plugin.name}' from {plugin.distribution} failed to load and is left "
                f"out: {plugin.reason}"
            )
        lines += [f"plugin '{plugin.name}': {warning}" for warning in plugin.warnings]
    if lines and not os.environ.get("GSA_PLUGINS_REPORTED"):
        os.environ["GSA_PLUGINS_REPORTED"] = "1"  # workers inherit it and stay quiet
        print("\n".join(f"gsa-platform: {line}" for line in lines), file=sys.stderr)


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
        return True
    except importlib.metadata.PackageNotFoundError:
        return importlib.util.find_spec(name.partition(".")[0].replace("-", "_")) is not None


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


def _check_component(slot: str, item: Any) -> None:
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


def _describe(error: BaseException) -> str:
    text = str(error).strip() or "no message"
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
