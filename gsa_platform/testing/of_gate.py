"""Probes of gates: finite multipliers that broadcast, and that belong to their token."""

from __future__ import annotations

import torch

from gsa_platform.contracts import GateValues
from gsa_platform.testing.case import HEADS, KV_HEADS, Case
from gsa_platform.testing.check import probe
from gsa_platform.testing.compare import expect_finite, expect_identical


@probe()
def values_are_finite_and_broadcast(case: Case) -> None:
    """Calls the gate with hidden states of order 1 and 100, for 1 and 100 tokens: each multiplier
    is None or [B, T, heads, 1 or head width], finite."""
    part, width = case.part(case.build()), case.config().model.d_model
    for tokens, scale in ((1, 1.0), (case.length, 1.0), (case.length, 100.0)):
        torch.manual_seed(0)
        gates = part(scale * torch.randn(2, tokens, width, device=case.device))
        if not isinstance(gates, GateValues):
            raise AssertionError(f"a gate returns GateValues, not {type(gates).__name__}")
        for name, value, heads in (
            ("value_BTKE", gates.value_BTKE, KV_HEADS),
            ("output_BTHE", gates.output_BTHE, HEADS),
        ):
            if value is None:
                continue
            allowed = [(2, tokens, heads, last) for last in (1, case.head_dim)]
            if tuple(value.shape) not in allowed:
                raise AssertionError(
                    f"{name} has shape {tuple(value.shape)} for {tokens} tokens, allowed: "
                    f"{' or '.join(map(str, allowed))}"
                )
            expect_finite(value, f"{name} for hidden states of order {scale:g}")


@probe()
def a_gate_belongs_to_its_token(case: Case) -> None:
    """Replaces every other token's hidden state: a token's multipliers must stay, since a cache
    holds gated values."""
    part, width = case.part(case.build().to(case.dtype)), case.config().model.d_model
    torch.manual_seed(0)
    x = torch.randn(2, 8, width, device=case.device, dtype=case.dtype)
    other = x.clone()
    other[:, [0, 1, 2, 4, 5, 6, 7]] += 1.0
    before, after = part(x), part(other)
    for name in ("value_BTKE", "output_BTHE"):
        one, two = getattr(before, name), getattr(after, name)
        if one is not None:
            what = f"changing every other token ({name})"
            expect_identical(two[:, 3:4], one[:, 3:4], what, "it looks around", 3)
