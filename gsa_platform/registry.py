"""Components by slot and name: looked up, built, and shared by the whole process."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from gsa_platform.components import Component, Entry
from gsa_platform.errors import UserError, unknown
from gsa_platform.plugin_loader import KINDS, PluginLoader, describe


class Registry(PluginLoader):
    """Looks up and builds the components of the plugins that were loaded."""

    def component(self, slot: str, name: str) -> Component:
        """Return the component, or raise UserError with the choices and any broken plugin."""
        return self.entry(slot, name).component

    def entry(self, slot: str, name: str) -> Entry:
        """Return the component with its plugin; raises UserError like ``component``."""
        if slot not in KINDS:
            raise UserError(unknown("slot", slot, KINDS))
        if name not in self.entries[slot]:
            raise UserError(
                unknown(slot.replace("_", " "), name, self.names(slot)) + self.broken_text(name)
            )
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
        schema = OmegaConf.structured(component.config)
        try:
            config = OmegaConf.to_object(OmegaConf.merge(schema, node))
        except OmegaConfBaseException as error:
            raise UserError(_misfits(f"{slot}={component.name}", schema, node)) from error
        try:
            return self.target(slot, component.name)(config, dims)
        except UserError:
            raise
        except ValueError as error:  # a setting that the component refuses
            raise UserError(f"{slot}={component.name}: {error}") from error

    def target(self, slot: str, name: str) -> Any:
        """Import and return the class or function that a record names."""
        entry = self.entry(slot, name)
        if reason := entry.unavailable():
            raise UserError(f"{slot}={name} cannot run here: {reason}.")
        module_name, _, attribute = entry.component.target.partition(":")
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"{slot}={name}: plugin '{entry.plugin.name}' names the class "
                f"'{entry.component.target}', which cannot be imported: {describe(error)}"
            ) from error


def _misfits(chosen: str, schema: Any, node: Any) -> str:
    from gsa_platform.kinds import as_typed, misfit

    for key, value in node.items():
        if key not in schema:
            return unknown(f"setting of {chosen}", key, map(str, schema))
        if text := misfit(schema, key, value):
            return f"{chosen}, {key}={as_typed(value)}: {text}."
    return f"{chosen}: its settings do not fit"


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
