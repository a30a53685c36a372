"""FLOPs and memory of a model by formula, before anything is built. No torch.

Conventions: a multiply-add is 2 FLOPs; norms, activations, softmax, rotary embedding and the
embedding lookup are not counted; recomputation (activation checkpointing, kernels that form the
probabilities again) is not counted, as model FLOPs utilisation wants it.

Per token and layer, with D width, H query heads, K kv heads, E head dim, F ffn width:
    projections  2 D E (2 H + 2 K)                  q, k, v and output
    attention    4 H E n                            q.k and p.v over n keys
    ffn          6 D F                              SwiGLU: gate, up, down
and once per token: head 2 D V. Dense causal attention over T tokens averages n = T / 2 keys.
The backward pass costs twice the forward pass, so training is 3 x forward.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Dimensions:
    """Sizes with the config's zeros (derive it) resolved."""

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    tie_embeddings: bool


def dimensions(model_cfg: Any) -> Dimensions:
    """Resolve head_dim 0 to d_model / n_heads and ffn_dim 0 to 8/3 d_model rounded up to 64."""
    head_dim = model_cfg.head_dim or model_cfg.d_model // model_cfg.n_heads
    ffn_dim = model_cfg.ffn_dim or -(-8 * model_cfg.d_model // (3 * 64)) * 64
    return Dimensions(
        d_model=model_cfg.d_model,
        n_layers=model_cfg.n_layers,
        n_heads=model_cfg.n_heads,
        n_kv_heads=model_cfg.n_kv_heads,
        head_dim=head_dim,
        ffn_dim=ffn_dim,
        tie_embeddings=bool(model_cfg.tie_embeddings),
    )


@dataclass(frozen=True)
class TokenFlops:
    """Forward FLOPs per token, all layers together, by part."""

    projections: int
    attention: int
    indexer: int
    gates: int
    ffn: int
    head: int

    @property
    def forward(self) -> int:
        return self.projections + self.attention + self.indexer + self.gates + self.ffn + self.head

    @property
    def training(self) -> int:
        """Forward and backward: 3 x forward."""
        return 3 * self.forward


def mean_keys(context: int, budget: int) -> float:
    """Mean keys per query if query i attends min(i + 1, budget) keys, i = 0..context-1."""
    full = min(budget, context)
    return (full * (full + 1) / 2 + (context - full) * full) / context


def flops_per_token(
    model_cfg: Any,
    context: int,
    vocab: int,
    keys_per_query: float | None = None,
    sparse_layers: int | None = None,
    indexer_flops: int = 0,
    gate_parameters: int = 0,
) -> TokenFlops:
    """FLOPs per token of a decoder.

    context: tokens per sequence. keys_per_query: mean keys attended in a sparse layer (measured,
    or `mean_keys`); None: dense causal. sparse_layers: how many layers are sparse, the rest being
    dense; None: all. indexer_flops: forward FLOPs per token of one sparse layer's indexer
    (projections and scoring, `indexer_scoring_flops`). gate_parameters: weights of one layer's
    gate projections.
    """
    d = dimensions(model_cfg)
    dense = 2 * d.n_heads * d.head_dim * context
    if keys_per_query is None:
        n_sparse, sparse = 0, 0
    else:
        n_sparse = d.n_layers if sparse_layers is None else sparse_layers
        sparse = round(4 * d.n_heads * d.head_dim * keys_per_query)
    projection = 2 * d.d_model * d.head_dim * (2 * d.n_heads + 2 * d.n_kv_heads)
    return TokenFlops(
        projections=d.n_layers * projection,
        attention=(d.n_layers - n_sparse) * dense + n_sparse * sparse,
        indexer=n_sparse * indexer_flops,
        gates=d.n_layers * 2 * gate_parameters,
        ffn=d.n_layers * 6 * d.d_model * d.ffn_dim,
        head=2 * d.d_model * vocab,
    )


def indexer_scoring_flops(
    d_model: int, heads: int, dim: int, context: int, key_block: int = 1
) -> int:
    """Forward FLOPs per token of one indexer: projections and scores of all causal keys.

    Projections: 2 D (J I + I + J) for J query heads of I channels, one key and J head weights.
    Scores: 2 J I over context / 2 keys, or key blocks where keys are pooled `key_block` at a time.
    """
    return 2 * d_model * (heads * dim + dim + heads) + heads * dim * context // key_block


def parameter_count(
    model_cfg: Any, vocab: int, gate_parameters: int = 0, indexer_parameters: int = 0
) -> int:
    """Weights of the decoder; gate and indexer parameters are per layer."""
    d = dimensions(model_cfg)
    attention = d.d_model * d.head_dim * (2 * d.n_heads + 2 * d.n_kv_heads)
    if bool(model_cfg.qk_norm):
        attention += 2 * d.head_dim
    layer = attention + 3 * d.d_model * d.ffn_dim + 2 * d.d_model
    embeddings = vocab * d.d_model * (1 if d.tie_embeddings else 2)
    return d.n_layers * (layer + gate_parameters + indexer_parameters) + embeddings + d.d_model


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of training on one device, without allocator overhead."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.loss


# Bytes per value: stored parameter, its low-precision copy under autocast, activation.
_BYTES = {"32-true": (4, 0, 4), "bf16-mixed": (4, 2, 2), "bf16-true": (2, 0, 2)}


def training_memory(
    model_cfg: Any,
    context: int,
    vocab: int,
    batch_size: int = 1,
    precision: str = "32-true",
    checkpointing: bool = False,
    ce_chunk: int = 1024,
    parameters: int | None = None,
) -> Memory:
    """Bytes for a micro-batch of `batch_size` sequences of `context` tokens with AdamW.

    precision: "32-true", "bf16-mixed" or "bf16-true" (ValueError otherwise). parameters: exact
    count if known, else `parameter_count`. Saved per token and layer: block and norm outputs 4 D;
    q, k, v before and after rotation 2 (H + K) E + K E; attention output H E; ffn 4 F; row sums
    4 B per head. With checkpointing: D per layer, plus one layer in full while it is recomputed.
    Loss: logits of one chunk and their exponentials in float32, the hidden states' gradient, and
    the output embedding's gradient in float32.
    """
    if precision not in _BYTES:
        raise ValueError(f"precision={precision!r}: choose one of {', '.join(_BYTES)}")
    stored, copied, active = _BYTES[precision]
    d = dimensions(model_cfg)
    count = parameter_count(model_cfg, vocab) if parameters is None else parameters
    tokens = batch_size * context
    values = 4 * d.d_model + 4 * d.ffn_dim
    values += d.head_dim * (3 * d.n_heads + 3 * d.n_kv_heads)
    layer = tokens * (values * active + 4 * d.n_heads)
    if checkpointing:
        activations = d.n_layers * tokens * d.d_model * active + layer
    else:
        activations = d.n_layers * layer
    chunk = min(ce_chunk, tokens)
    return Memory(
        parameters=count * (stored + copied),
        gradients=count * stored,
        optimizer=2 * count * stored,
        activations=activations,
        loss=2 * 4 * chunk * vocab + tokens * d.d_model * active + 4 * vocab * d.d_model,
    )
