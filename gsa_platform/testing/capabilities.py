"""Probes of what a component says about itself: what it declares works, the rest is refused."""

from __future__ import annotations

from dataclasses import replace

import torch

from gsa_platform import compose, registry
from gsa_platform.errors import UserError
from gsa_platform.model.transformer import Transformer
from gsa_platform.testing.case import Case
from gsa_platform.testing.check import SkipTest, probe
from gsa_platform.testing.compare import expect_finite
from gsa_platform.validate import validate

# Capability flag -> the setting under which validation must refuse a component without it.
REFUSED = {
    "varlen": "data.cross_document=false",
    "deterministic": "train.deterministic=true",
    "backward": "train.steps=1",
}


@probe(anywhere=True)
def the_skips_are_truthful(case: Case) -> None:
    """Where the other checks are skipped, tries the component all the same: it must really fail
    without the packages or the device it says it needs."""
    reason = case.unavailable()
    component = case.entry.component
    if not reason or not component.target:
        return
    found = registry.get().entries[case.slot]
    entry = found[case.name]
    bare = replace(component, capabilities=replace(component.capabilities, needs=()))
    found[case.name] = replace(entry, component=bare)  # past the host's own refusal
    try:
        cfg = compose.load(case.overrides(case.sizes))  # not part of it: settings need no device
        try:
            case.run(Transformer(cfg, 256, registry.get()), torch.arange(100)[None])
        except Exception:  # whatever it raises, it did not run
            return
    finally:
        found[case.name] = entry
    raise AssertionError(f"the checks are skipped because '{reason}', and yet it runs here")


@probe()
def declared_head_dims_work(case: Case) -> None:
    """Builds and runs the smallest and the largest declared head width; another is refused."""
    dims = case.can.head_dims
    if not dims:
        raise SkipTest("declares no head widths, so any")
    for width in {min(dims), max(dims)}:
        expect_finite(
            case.run(case.model(*_width(width)), case.text()), f"with heads of {width}, the output"
        )
    other = next(width for width in range(2, 2 + 2 * len(dims) + 2, 2) if width not in dims)
    expect_refusal(case, _width(other), f"heads of {other}, which it does not declare,")


def _width(width: int) -> tuple[str, str]:
    return f"model.head_dim={width}", f"model.d_model={4 * width}"


@probe()
def what_is_not_declared_is_refused(case: Case) -> None:
    """For every flag it declares False, and every device, dtype and mode it leaves out, composes
    a run that needs it: validation must raise a UserError that names the component."""
    for flag, setting in REFUSED.items():
        if not getattr(case.can, flag):
            expect_refusal(case, (setting,), f"{flag}=False with {setting}")
    if "bfloat16" not in case.can.dtypes:
        expect_refusal(case, ("trainer.precision=bf16-true",), "a precision it leaves out")
    for device in ("cpu", "cuda"):
        if device not in case.can.devices:
            expect_refusal(case, (f"trainer.accelerator={device}",), f"the device {device}")
    if case.slot == "attention" and case.mode and "mode" in case.config().attention:
        expect_refusal(case, ("attention.mode=no_such_mode",), "a mode it does not have")
    if not case.can.decode:
        try:
            case.model().new_cache()
        except UserError as error:
            if case.name in str(error):
                return
        raise AssertionError("it declares decode=False, and yet the model gives out a cache")


def expect_refusal(case: Case, settings: tuple[str, ...], what: str) -> None:
    """Raise AssertionError unless a run with these settings is refused."""
    try:
        cfg = compose.load(case.overrides(case.sizes, settings))
        validate(cfg)
        Transformer(cfg, 16, registry.get())
    except UserError:
        return
    raise AssertionError(f"{what}: the run is not refused, but should be")
