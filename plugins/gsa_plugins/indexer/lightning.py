"""Lightning indexers: cheap scores of every key for every query, one key vector per position."""

import torch
from torch import Tensor, nn

from gsa_kernels.index_score.api import BLOCK_SCORES, IndexFactors
from gsa_kernels.selection import SelectionSpec
from gsa_platform.contracts import LayerDims, Sequence
from gsa_platform.model.flops import indexer_scoring_flops
from gsa_platform.model.rope import RotaryTable, apply_rotary

from ..configs import GatedLightningConfig, ReluLightningConfig
from .base import BlockIndexer

SCALES = ("rsqrt", "none")


class LightningIndexer(BlockIndexer):
    """What both forms share: projections of queries, keys and head weights, and selection.

    Projections start with standard deviation 1/sqrt(d_model), so that index logits of normalised
    inputs have unit variance and no sigmoid starts saturated.
    """

    activation: str

    def __init__(
        self,
        config: GatedLightningConfig | ReluLightningConfig,
        dims: LayerDims,
        weight_bias: bool,
        head_bias: bool,
    ) -> None:
        super().__init__()
        if config.block_score not in BLOCK_SCORES:
            raise ValueError(
                f"indexer.block_score={config.block_score!r}: choose {' or '.join(BLOCK_SCORES)}"
            )
        if config.scale not in SCALES:
            raise ValueError(f"indexer.scale={config.scale!r}: choose {' or '.join(SCALES)}")
        self.heads, self.dim = config.heads, config.dim
        self.block_score = config.block_score
        self.scale = config.dim**-0.5 if config.scale == "rsqrt" else 1.0
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
            nn.init.zeros_(self.weight_proj.bias)
        if self.head_bias is not None:
            nn.init.zeros_(self.head_bias)

    def head_weights(self, x_BTD: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x_BTD: Tensor, seq: Sequence, spec: SelectionSpec) -> IndexFactors:
        batch, queries, _ = x_BTD.shape
        q = self.q_proj(x_BTD).view(batch, queries, self.heads, self.dim)
        k = self.k_proj(x_BTD)
        if self.rotary is not None:
            position = torch.arange(queries, device=x_BTD.device) + seq.q_start
            cos, sin = self.rotary.cos_sin(position)
            q = apply_rotary(q, cos, sin)
            k = apply_rotary(k[:, :, None], cos, sin)[:, :, 0]
        return IndexFactors(
            q,
            k,
            self.head_weights(x_BTD),
            self.head_bias,
            self.scale,
            self.activation,
            self.block_score,
            spec.heads,
            q_start=seq.q_start,
        )

    def flops(self, context: int, spec: SelectionSpec) -> int:
        block = spec.key_block if self.block_score == "mean" else 1
        # A tile scores once for all its queries.
        return indexer_scoring_flops(
            self.q_proj.in_features, self.heads, self.dim, context // spec.query_tile, block
        )


class GatedLightningIndexer(LightningIndexer):
    """I[t,s] = sum_j sigmoid(x_t w_j + c_j) sigmoid(q[t,j] . k[s] * scale + b_j), in (0, J).

    The paper's figure has no scale and no c_j (scale=none, weight_bias=false); its code has both.
    """

    activation = "sigmoid"

    def __init__(self, config: GatedLightningConfig, dims: LayerDims) -> None:
        super().__init__(config, dims, config.weight_bias, config.head_bias)

    def head_weights(self, x_BTD: Tensor) -> Tensor:
        return self.weight_proj(x_BTD).sigmoid()


class ReluLightningIndexer(LightningIndexer):
    """I[t,s] = sum_j w[t,j] relu(q[t,j] . k[s] * scale), w linear in x (DeepSeek-V3.2)."""

    activation = "relu"

    def __init__(self, config: ReluLightningConfig, dims: LayerDims) -> None:
        super().__init__(config, dims, weight_bias=True, head_bias=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        # Signed weights around zero would start as noise: all heads begin with weight 1.
        assert self.weight_proj.bias is not None
        nn.init.ones_(self.weight_proj.bias)

    def head_weights(self, x_BTD: Tensor) -> Tensor:
        return self.weight_proj(x_BTD)
