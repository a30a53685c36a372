"""The data module that a configuration names."""

from __future__ import annotations

from typing import Any

from gsa_platform import registry
from gsa_platform.data.datamodule import TextDataModule


def build_data(cfg: Any) -> TextDataModule:
    """Build the data module `data.name` of a resolved configuration, whoever offers it."""
    found = registry.get(cfg.get("plugins_path"))
    module = found.target("data", cfg.data.name)(cfg)
    assert isinstance(module, TextDataModule), f"data={cfg.data.name} is no TextDataModule"
    return module
