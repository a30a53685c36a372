"""Sigmoid gates on values (G2) and on the attention output (G1), arXiv 2505.06708."""

import torch
from torch import Tensor, nn

from gsa_platform.contracts import Gate, GateValues, LayerDims

from .configs import DualGateConfig, OutputGateConfig, ValueGateConfig

GRANULARITIES = ("elementwise", "headwise")


class SigmoidGate(Gate):
    """g = sigmoid(x W + b), one number per channel or per head; which gates: the config's name.

    The value gate reads the key-side token, so a cache holds gated values.
    """

    def __init__(
        self, config: ValueGateConfig | OutputGateConfig | DualGateConfig, dims: LayerDims
    ) -> None:
        super().__init__()
        if config.granularity not in GRANULARITIES:
            choices = " or ".join(GRANULARITIES)
            raise ValueError(f"gate.granularity={config.granularity!r}: choose {choices}")
        channels = dims.head_dim if config.granularity == "elementwise" else 1
        self.bias = config.bias
        self.value_shape, self.output_shape = (dims.n_kv_heads, channels), (dims.n_heads, channels)
        self.value_proj = self.output_proj = None
        if config.name in ("value", "dual"):
            self.value_proj = nn.Linear(dims.d_model, dims.n_kv_heads * channels)
        if config.name in ("output", "dual"):
            self.output_proj = nn.Linear(dims.d_model, dims.n_heads * channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for proj in (self.value_proj, self.output_proj):
            if proj is not None:
                nn.init.normal_(proj.weight, std=0.02)
                nn.init.constant_(proj.bias, self.bias)

    def forward(self, x_BTD: Tensor) -> GateValues:
        value = output = None
        if self.value_proj is not None:
            value = torch.sigmoid(self.value_proj(x_BTD)).unflatten(-1, self.value_shape)
        if self.output_proj is not None:
            output = torch.sigmoid(self.output_proj(x_BTD)).unflatten(-1, self.output_shape)
        return GateValues(value, output)
