"""Every first-party component passes its contract kit."""

from __future__ import annotations

import re

import pytest

from gsa_platform import registry
from gsa_platform.components import SLOTS
from gsa_platform.testing import slot_checks

REASONS = (  # why a check may be skipped
    r"declares (backward|decode|varlen|deterministic|fused_gate)=False",
    r"declares devices .*, this machine has ",
    r"declares no head widths, so any",
    r"needs .* \(pip install .*\)",
    r"it attends to every key, as it declares",
    r"it takes no selection and declares no settings to prune less",
    r"declares no settings under which ",
    r"its budget does not depend on the scores",
    r"its weights depend on the number of key-value heads",
    r"it has no loss of its own, or does not detach the indexer",
    r"the indexer has no (parameters|matrices to learn)",
    r"the indexer rounds: its gradients are of no difference",
)


def names(slot: str) -> list[str]:
    found = registry.get()
    entries = [found.entry(slot, name) for name in found.names(slot)]
    return [
        e.component.name
        for e in entries
        if e.component.target and e.plugin.distribution == "gsa-platform"
    ]


CHECKS = [
    pytest.param(check, id=f"{slot}={name}-{check}")
    for slot in SLOTS
    for name in names(slot)
    for check in slot_checks(slot, name)
]
# Small enough for the coarse scores to prune too, which not every budget allows.
CHECKS += [
    pytest.param(check, id=f"indexer=hierarchical-few_survivors-{check}")
    for check in slot_checks("indexer", "hierarchical", {"survivors": 4}, ["attention.mode=tile"])
    if "equals_dense" not in str(check)
]
CHECKS += [
    pytest.param(check, id=f"indexer=hierarchical-bound-{check}")
    for check in slot_checks(
        "indexer", "hierarchical", {"pooling": "bound"}, ["attention.mode=token"]
    )
]
CHECKS += [
    pytest.param(check, id=f"indexer={name}-fp8-{check}")
    for name, beside in (
        ("gated_lightning", []),
        ("pooled", ["attention.mode=token"]),
        ("hierarchical", ["attention.mode=token"]),
    )
    for check in slot_checks("indexer", name, {"key_dtype": "fp8"}, beside)
]


@pytest.mark.parametrize("check", CHECKS)
def test_contract(check):
    try:
        check()
    except Exception as reason:
        if type(reason).__name__ == "SkipTest":
            assert any(re.search(text, str(reason)) for text in REASONS), str(reason)
        raise


def test_every_slot_is_covered():
    assert {slot: bool(names(slot)) for slot in SLOTS} == dict.fromkeys(SLOTS, True)
