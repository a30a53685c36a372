"""Gates on values (G2) and on the attention output (G1), arXiv 2505.06708."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsa_platform.contracts import Gate, GateValues, LayerDims

from .configs import DualGateConfig, OutputGateConfig, ValueGateConfig

GRANULARITIES = ("elementwise", "headwise")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": lambda z: 1 + torch.tanh(z),
}


class ProjectedGate(Gate):
    """g = act(x W + b), one number per channel or per head; which gates: the config's name.

        sigmoid   in (0, 1), starts at 0.5 with b = 0: closes what is not wanted (the papers')
        silu      z sigmoid(z), from -0.28 up: the unbounded gate of arXiv 2505.06708; it starts
                  closed with b = 0 and at 1 with b = 1.278
        tanh      1 + tanh(z) = 2 sigmoid(2 z), in (0, 2): starts at 1, so that the layer begins
                  as an ungated one; a bare tanh would begin at 0 and change signs

    The value gate reads the key-side token, so a cache holds gated values. Raises ValueError for
    a granularity or activation that does not exist.
    """

    def __init__(
        self, config: ValueGateConfig | OutputGateConfig | DualGateConfig, dims: LayerDims
    ) -> None:
        super().__init__()
        if config.granularity not in GRANULARITIES:
            choices = " or ".join(GRANULARITIES)
            raise ValueError(f"gate.granularity={config.granularity!r}: choose {choices}")
        if config.activation not in ACTIVATIONS:
            choices = ", ".join(ACTIVATIONS)
            raise ValueError(f"gate.activation={config.activation!r}: choose one of {choices}")
        channels = dims.head_dim if config.granularity == "elementwise" else 1
        self.activation, self.bias = config.activation, config.bias
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
        act = ACTIVATIONS[self.activation]
        if self.value_proj is not None:
            value = act(self.value_proj(x_BTD)).unflatten(-1, self.value_shape)
        if self.output_proj is not None:
            output = act(self.output_proj(x_BTD)).unflatten(-1, self.output_shape)
        return GateValues(value, output)
