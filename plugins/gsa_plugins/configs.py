"""Typed settings of the first-party components. No torch here: listing plugins reads this file."""

from dataclasses import dataclass


@dataclass
class DenseAttentionConfig:
    name: str = "dense"
    backend: str = "auto"  # auto, cudnn, flash, efficient, math (holds T x S) or fa3


@dataclass
class SlidingWindowConfig:
    name: str = "sliding_window"
    window: int = 4096  # most recent keys a query attends, itself included
    sinks: int = 0  # first keys of the document, always attended
    impl: str = "auto"  # auto, chunked (PyTorch SDPA) or flash (CUDA, half precision, no sinks)


@dataclass
class XformersConfig:
    name: str = "xformers"
    window: int = 0  # most recent keys a query attends, itself included; 0 = every causal key


@dataclass
class GsaAttentionConfig:
    name: str = "gsa"
    mode: str = "tile"  # token: single keys per query; block: key blocks per query; tile: shared
    key_block: int = 0  # C, keys chosen together; 0 = the mode's default (token 1, else 64)
    query_tile: int = 0  # R, queries sharing a choice; 0 = the mode's default (tile 64, else 1)
    selection_heads: str = "shared"  # shared: one choice for all heads; kv: one per key-value head
    impl: str = "auto"  # auto, eager, reference or triton; auto says what it chose


@dataclass
class FlexConfig:
    name: str = "flex"
    mode: str = "tile"  # block: key blocks per query; tile: shared by a tile of queries
    key_block: int = 0  # C, keys chosen together; 0 = 64
    query_tile: int = 0  # R, queries sharing a choice; 0 = the mode's default (tile 64, block 1)
    selection_heads: str = "shared"  # shared: one choice for all heads; kv: one per key-value head
    block: int = 128  # side of the cells that are computed or skipped: 64 (tuned at first use) up
    impl: str = "auto"  # auto, compiled, or eager (plain PyTorch, T x S in cost; for CPUs)


@dataclass
class XformersSparseConfig:
    name: str = "xformers_sparse"
    mode: str = "tile"
    key_block: int = 0  # C, 16, 32, 64 or 128; 0 = 64
    query_tile: int = 0  # R, 16, 32 or 64; 0 = 64
    selection_heads: str = "shared"  # shared: one choice for all heads; kv: one per key-value head


@dataclass
class NoIndexerConfig:
    name: str = "none"


@dataclass
class GatedLightningConfig:
    name: str = "gated_lightning"
    heads: int = 4  # J, index heads
    dim: int = 64  # I, width of an index query or key
    scale: str = "rsqrt"  # rsqrt: scores divided by sqrt(dim); none: as in the paper's figure
    head_bias: bool = True  # b_j inside the key sigmoid
    weight_bias: bool = True  # c_j inside the head-weight sigmoid
    block_score: str = "mean"  # a block's score: from its mean key (cheap), or max over its keys
    rope: bool = True  # rotary index queries and keys: without it no score knows the distance


@dataclass
class ReluLightningConfig:
    name: str = "relu_lightning"
    heads: int = 4
    dim: int = 64
    scale: str = "rsqrt"
    block_score: str = "mean"
    rope: bool = True


@dataclass
class NoSparsityConfig:
    name: str = "none"


@dataclass
class FixedBudgetConfig:
    name: str = "fixed"
    k: int = 2048  # keys a query may attend, window and sinks included
    window: int = 128  # most recent keys, always attended (self included)
    sinks: int = 64  # first keys of the document, always attended


@dataclass
class AdaptiveVarianceConfig:
    name: str = "adaptive_variance"
    k: int = 2048  # budget at average variance, window and sinks included
    k_min: int = 256
    k_max: int = 4096
    window: int = 128
    sinks: int = 64
    sign: str = "decreasing"  # budget as the variance grows: decreasing or increasing
    form: str = "ratio"  # ratio (paper): k V / Vbar; logistic (its code): 0.5 k to 1.5 k
    temperature: float = 1.0  # exponent-like strength of the response
    decay: float = 0.99  # of the running mean of the variance


@dataclass
class NoGateConfig:
    name: str = "none"


@dataclass
class ValueGateConfig:
    name: str = "value"
    granularity: str = "elementwise"  # elementwise or headwise (one scalar per head)
    bias: float = 0.0  # initial bias: the gate starts at sigmoid(bias)


@dataclass
class OutputGateConfig:
    name: str = "output"
    granularity: str = "elementwise"
    bias: float = 0.0


@dataclass
class DualGateConfig:
    name: str = "dual"
    granularity: str = "elementwise"
    bias: float = 0.0


@dataclass
class NoObjectiveConfig:
    name: str = "none"


@dataclass
class KlObjectiveConfig:
    name: str = "kl"
    weight: float = 1.0  # of the mean KL, added to the language-model loss
    warmup_steps: int = 0  # dense warm-up: dense attention, KL over every causal key
    dense_rows: int = 8  # query tiles per sequence whose KL is taken over every candidate key
    selected: bool = True  # after the warm-up, also KL on the selected keys of every query tile
    distribution: str = "log"  # of index scores: log (normalised to sum 1) or softmax
    detach: bool = True  # the indexer reads detached inputs: its loss never moves the model


@dataclass
class BiasObjectiveConfig:
    name: str = "bias"
    beta: float = 1.0  # attention logits of selected keys gain beta * log(score)
    detach: bool = False
