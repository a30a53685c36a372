"""The callbacks that a configuration turns on."""

from __future__ import annotations

from typing import Any

import lightning as L
from omegaconf import OmegaConf

from gsa_platform import registry
from gsa_platform.errors import UserError


def build_callbacks(cfg: Any) -> list[L.Callback]:
    """Build every callback whose ``callbacks.NAME.enabled`` is true, as Class(settings, cfg)."""
    found, built = registry.get(cfg.get("plugins_path")), []
    for name, node in (cfg.get("callbacks") or {}).items():
        if not node.get("enabled"):
            continue
        kind = found.component("callback", name).config
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), node))
        try:
            built.append(found.target("callback", name)(settings, cfg))
        except UserError:
            raise
        except ValueError as error:  # a setting that it refuses
            raise UserError(f"callbacks.{name}: {error}") from error
    return built
