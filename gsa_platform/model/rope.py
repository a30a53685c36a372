"""Rotary position embedding (half-split layout) with optional YaRN context extension.

Angles are formed in float64: near position 131072 a float32 angle of a fast pair is off by up to
0.01 rad. Nothing is cached; a model computes cos and sin once per forward pass and shares
them between its layers.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from gsa_platform.errors import UserError

KINDS = ("none", "yarn")


class RopeScaling(Protocol):
    """Settings of context extension, as in the model config."""

    kind: str
    factor: float
    original_context: int
    beta_fast: float
    beta_slow: float


class RotaryTable:
    """Rotation angles of a head of `head_dim` channels; pair i is channels (i, i + head_dim/2).

    Holds numbers only: no tensor that a dtype conversion of the model could round.
    """

    def __init__(
        self, head_dim: int, theta: float = 10000.0, scaling: RopeScaling | None = None
    ) -> None:
        """theta: base of the geometric frequencies; scaling: None is kind "none".

        Raises UserError for an odd head_dim or unusable scaling.
        """
        if head_dim % 2:
            raise UserError(f"rotary embedding needs an even head_dim, got {head_dim}")
        self.head_dim = head_dim
        self.theta = float(theta)
        self.scaling = scaling
        kind = "none" if scaling is None else scaling.kind
        if kind not in KINDS:
            raise UserError(f"model.rope_scaling.kind={kind!r}: choose one of {', '.join(KINDS)}")
        self.yarn = kind == "yarn"
        self.mscale = 1.0
        if scaling is not None and self.yarn:
            if scaling.factor < 1:
                raise UserError(
                    f"model.rope_scaling.factor={scaling.factor}: YaRN extends, use 1 or more"
                )
            if not scaling.original_context or scaling.original_context < 1:
                raise UserError(
                    "model.rope_scaling.original_context must be the trained context in tokens"
                    f" for kind=yarn, got {scaling.original_context}"
                )
            self.mscale = 0.1 * math.log(scaling.factor) + 1.0

    def inverse_frequencies(self, device: torch.device | str | None = None) -> Tensor:
        """Radians per position of each pair [head_dim/2], float64, fastest first."""
        half = self.head_dim // 2
        pair = torch.arange(half, dtype=torch.float64, device=device)
        plain = self.theta ** (-pair / half)
        scaling = self.scaling
        if scaling is None or not self.yarn:
            return plain
        # NTK-by-parts (Peng et al. 2023, arXiv 2309.00071, section 3.2): pairs that turn more than
        # beta_fast times over the trained context stay, those below beta_slow are interpolated.
        low = max(math.floor(self._pair_of(scaling.beta_fast, scaling.original_context)), 0)
        high = math.ceil(self._pair_of(scaling.beta_slow, scaling.original_context))
        high = min(high, self.head_dim - 1)
        ramp = ((pair - low) / max(high - low, 1e-3)).clamp(0.0, 1.0)
        return plain * (1.0 - ramp) + plain / scaling.factor * ramp

    def _pair_of(self, turns: float, context: int) -> float:
        """The (fractional) pair that makes `turns` full turns over `context` positions."""
        half = self.head_dim / 2
        return half * math.log(context / (2 * math.pi * turns)) / math.log(self.theta)

    def cos_sin(
        self,
        positions: Tensor,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """cos and sin [..., T, head_dim/2] of integer positions [..., T].

        device: default that of `positions`. Under YaRN both carry the attention temperature
        (0.1 ln factor + 1), which scales every logit by its square.
        """
        device = positions.device if device is None else device
        angles = positions.to(device, torch.float64)[..., None] * self.inverse_frequencies(device)
        return (angles.cos() * self.mscale).to(dtype), (angles.sin() * self.mscale).to(dtype)


def apply_rotary(x_BTHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys [B,T,H,E]; cos, sin: [T, E/2] or [B, T, E/2] of `RotaryTable`.

    Computed in the wider of the two dtypes, returned in x's dtype.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    first, second = x_BTHE.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x_BTHE.dtype)
