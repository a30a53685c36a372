"""Hydra search path entries for the YAML that plugins bring: their subpackage named ``conf``."""

from __future__ import annotations

import importlib.util

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from gsa_platform import registry

FOLDERS: list[str] = []  # of --config-dir, while an error is explained


class PluginSearchPath(SearchPathPlugin):
    """Appends ``pkg://<package>.conf`` for each loaded plugin whose package has that folder."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in FOLDERS:
            search_path.append("command line", f"file://{folder}")
        for plugin in registry.get().plugins:
            if plugin.module is None:
                continue
            package = plugin.module.__name__
            if not hasattr(plugin.module, "__path__"):
                package = package.rpartition(".")[0]
            if package and importlib.util.find_spec(f"{package}.conf") is not None:
                search_path.append(f"plugin {plugin.distribution}", f"pkg://{package}.conf")
