"""Lightning indexers: cheap scores of every key for every query, one key vector per position."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gsa_kernels.index_score.api import (
    ACTIVATIONS,
    BLOCK_SCORES,
    KEY_DTYPES,
    IndexFactors,
    fp8_keys,
)
from gsa_kernels.selection import SelectionSpec
from gsa_platform.contracts import LayerDims, Sequence
from gsa_platform.model.flops import indexer_scoring_flops
from gsa_platform.model.rope import RotaryTable, apply_rotary

from ..configs import GatedLightningConfig, LightningConfig, ReluLightningConfig
from .base import BlockIndexer

SCALES = ("rsqrt", "none")
NORM_EPS = 1e-6


class LightningIndexer(BlockIndexer):
    """What all of them share: projections of queries, keys and head weights, and their scores

        sigmoid   I[t,s] = sum_j sigmoid(x_t w_j + c_j) sigmoid(q[t,j] . k[s] * scale + b_j)
        relu      I[t,s] = sum_j (x_t w_j + c_j) relu(q[t,j] . k[s] * scale)

    Projections start with standard deviation 1/sqrt(d_model), so that index logits of normalised
    inputs have unit variance and no sigmoid starts saturated. With qk_norm, RMSNorm without a gain
    before the rotary embedding, |q . k| scale <= sqrt(I) (scale=rsqrt) whatever is learnt: a step
    of the optimizer moves logits by its square times the width, and saturated sigmoids tie keys.
    key_dtype=fp8 rounds the keys to a byte a channel (gsa_kernels.index_score.fp8): training
    scores what decoding reads from its cache. Raises ValueError for a setting that does not exist.
    """

    def __init__(
        self,
        config: LightningConfig,
        dims: LayerDims,
        activation: str,
        block_score: str = "mean",
        weight_bias: bool = True,
        head_bias: bool = True,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("block_score", block_score, BLOCK_SCORES),
            ("activation", activation, ACTIVATIONS),
            ("scale", config.scale, SCALES),
            ("key_dtype", config.key_dtype, KEY_DTYPES),
        ):
            if value not in choices:
                raise ValueError(f"indexer.{name}={value!r}: choose {' or '.join(choices)}")
        self.heads, self.dim = config.heads, config.dim
        self.activation, self.block_score = activation, block_score
        self.straight_through = config.key_dtype == "fp8"
        self.scale = config.dim**-0.5 if config.scale == "rsqrt" else 1.0
        self.qk_norm = config.qk_norm
        self.rotary = RotaryTable(config.dim, dims.rope_theta) if config.rope else None
        self.q_proj = nn.Linear(dims.d_model, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(dims.d_model, self.dim, bias=False)
        self.weight_proj = nn.Linear(dims.d_model, self.heads, bias=weight_bias)
        self.head_bias = nn.Parameter(torch.zeros(self.heads)) if head_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        std = self.q_proj.in_features**-0.5
        for proj in (self.q_proj, self.k_proj):
            nn.init.normal_(proj.weight, std=std)
        nn.init.normal_(self.weight_proj.weight, std=0.1 * std)
        if self.weight_proj.bias is not None:
            # Signed weights around zero would start as noise: all ReLU heads begin at weight 1.
            nn.init.constant_(self.weight_proj.bias, float(self.activation == "relu"))
        if self.head_bias is not None:
            nn.init.zeros_(self.head_bias)

    def head_weights(self, x_BTD: Tensor) -> Tensor:
        weight = self.weight_proj(x_BTD)
        return weight.sigmoid() if self.activation == "sigmoid" else weight

    def factors(self, **parts: Any) -> IndexFactors:
        """The score function, from the fields that all of them have."""
        return IndexFactors(**parts)

    def outline(self, spec: SelectionSpec, keys: int) -> IndexFactors:
        def empty(*shape: int) -> Tensor:
            return torch.empty(1, keys, *shape, dtype=self.k_proj.weight.dtype, device="meta")

        return self._factors(
            empty(self.heads, self.dim), empty(self.dim), empty(self.heads), spec, 0
        )

    def forward(self, x_BTD: Tensor, seq: Sequence, spec: SelectionSpec) -> IndexFactors:
        batch, queries, _ = x_BTD.shape
        q = self.q_proj(x_BTD).view(batch, queries, self.heads, self.dim)
        k = self.k_proj(x_BTD)
        if self.qk_norm:
            q, k = self._normed(q), self._normed(k)
        if self.rotary is not None:
            position = torch.arange(queries, device=x_BTD.device) + seq.q_start
            if self.straight_through and seq.doc_start_BS is not None:
                # Rounding sees the angle itself: a document's keys round as they would alone.
                position = position - seq.doc_start_BS[:, seq.q_start : seq.q_start + queries]
            cos, sin = self.rotary.cos_sin(position)
            q = apply_rotary(q, cos, sin)
            k = apply_rotary(k[:, :, None], cos, sin)[:, :, 0]
        if self.straight_through:
            k = fp8_keys(k)
        return self._factors(q, k, self.head_weights(x_BTD), spec, seq.q_start)

    def _normed(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.dim,), eps=NORM_EPS).to(x.dtype)

    def _factors(
        self, q_BTJI: Tensor, k_BSI: Tensor, weight_BTJ: Tensor, spec: SelectionSpec, q_start: int
    ) -> IndexFactors:
        return self.factors(
            q_BTJI=q_BTJI,
            k_BSI=k_BSI,
            weight_BTJ=weight_BTJ,
            bias_J=self.head_bias,
            scale=self.scale,
            activation=self.activation,
            block_score=self.block_score,
            heads=spec.heads,
            q_start=q_start,
        )

    def flops(self, context: int, spec: SelectionSpec) -> int:
        block = spec.key_block if self.block_score == "mean" else 1
        # A tile scores once for all its queries.
        return indexer_scoring_flops(
            self.q_proj.in_features, self.heads, self.dim, context // spec.query_tile, block
        )


class GatedLightningIndexer(LightningIndexer):
    """The sigmoid form (arXiv 2601.15305); its scores lie in (0, J).

    The paper's figure has no scale and no c_j (scale=none, weight_bias=false); its code has both.
    """

    def __init__(self, config: GatedLightningConfig, dims: LayerDims) -> None:
        biases = (config.weight_bias, config.head_bias)
        super().__init__(config, dims, "sigmoid", config.block_score, *biases)


class ReluLightningIndexer(LightningIndexer):
    """The ReLU form, w linear in x (DeepSeek-V3.2)."""

    def __init__(self, config: ReluLightningConfig, dims: LayerDims) -> None:
        super().__init__(config, dims, "relu", config.block_score, head_bias=False)
