"""Gates that are wrong on purpose, each in one way."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gsa_platform import Component, hookimpl
from gsa_platform.contracts import Gate, GateValues


@dataclass
class OneForAllHeadsConfig:
    name: str = "one_for_all_heads"


@dataclass
class LooksBackConfig:
    name: str = "looks_back"


@hookimpl
def gsa_register_gate():
    return [
        Component("one_for_all_heads", "wrong_gates:OneForAllHeads", OneForAllHeadsConfig),
        Component("looks_back", "wrong_gates:LooksBack", LooksBackConfig),
    ]


class OneForAllHeads(Gate):
    """Has no head dimension of its own: it broadcasts without a word."""

    def __init__(self, config, dims):
        super().__init__()
        self.proj = nn.Linear(dims.d_model, dims.head_dim)

    def forward(self, x_BTD):
        return GateValues(output_BTHE=self.proj(x_BTD).sigmoid()[:, :, None])


class LooksBack(Gate):
    """Reads the token before, which decoding does not hand it."""

    def __init__(self, config, dims):
        super().__init__()
        self.proj = nn.Linear(dims.d_model, dims.n_heads)

    def forward(self, x_BTD):
        before = nn.functional.pad(x_BTD, (0, 0, 1, 0))[:, :-1]
        return GateValues(output_BTHE=self.proj(x_BTD + before).sigmoid()[..., None])
