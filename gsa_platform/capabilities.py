"""Whether components fit together, by what they say of themselves. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gsa_platform import hardware, registry
from gsa_platform.components import SLOTS, Capabilities

WHAT = {
    "mass": "the attention on each selected block",
    "bias": "an attention that adds a bias to its logits",
}


def device_kind(cfg: Any) -> str:
    """The kind of device a run would use: cpu or cuda (or an accelerator we do not know)."""
    kind = str(cfg.trainer.accelerator)
    return hardware.detect().kind if kind == "auto" else {"gpu": "cuda"}.get(kind, kind)


def attentions(cfg: Any) -> list[str]:
    """Names of the attentions that the layers use, unknown ones of a pattern left out."""
    pattern = [str(entry).partition(":")[0] for entry in cfg.model.layer_pattern]
    names = {cfg.attention.name if name == "*" else name for name in pattern or ["*"]}
    return sorted(names & set(registry.get().names("attention")))


def because(can: Capabilities, name: str) -> str:
    """Why this capability is missing or narrow, after a colon; "" if the component is silent."""
    return f": {can.reasons[name]}" if name in can.reasons else ""


def unmet(cfg: Any) -> Iterator[str]:
    """One problem for each capability that a component needs of an attention that lacks it."""
    found = registry.get()
    for slot in SLOTS:
        for need, setting in found.component(slot, cfg[slot].name).capabilities.requires.items():
            if setting and not cfg[slot].get(setting):
                continue
            for name in attentions(cfg):
                can = found.component("attention", name).capabilities
                if not can.modes or getattr(can, need):
                    continue
                remedies = [f"attention={n}" for n in _able(found, need)]
                if setting:
                    remedies.insert(0, f"{slot}.{setting}=false")
                asked = f" ({slot}.{setting}=true)" if setting else ""
                yield (
                    f"{slot}={cfg[slot].name} needs {WHAT.get(need, need)}{asked}, which "
                    f"attention={name} does not give{because(can, need)}. "
                    f"Type {' or '.join(remedies)}, or another {slot}."
                )


def _able(found: registry.Registry, need: str) -> list[str]:
    """Attentions over a Selection that have a capability and can run here."""
    entries = [found.entry("attention", name) for name in found.names("attention")]
    return [
        e.component.name
        for e in entries
        if e.component.capabilities.modes
        and getattr(e.component.capabilities, need)
        and not e.unavailable()
    ]
