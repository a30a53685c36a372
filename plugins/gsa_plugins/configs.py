"""Typed settings of the first-party components. No torch here: listing plugins reads this file."""

from dataclasses import dataclass

from gsa_platform.components import added


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
class LightningConfig:
    """What the lightning indexers share; no component by itself."""

    name: str = ""
    heads: int = 4  # J, index heads
    dim: int = 64  # I, width of an index query or key
    scale: str = "rsqrt"  # rsqrt: scores divided by sqrt(dim); none: as in the paper's figure
    qk_norm: bool = added(True, before=False)  # RMSNorm of index queries and keys: bounds logits
    rope: bool = True  # rotary index queries and keys: without it no score knows the distance
    key_dtype: str = (
        "auto"  # of the index keys: auto, as computed; fp8: rounded to a byte a channel
    )


@dataclass
class GatedLightningConfig(LightningConfig):
    name: str = "gated_lightning"
    block_score: str = "mean"  # a block's score: from its mean key (cheap), or max over its keys
    head_bias: bool = True  # b_j inside the key sigmoid
    weight_bias: bool = True  # c_j inside the head-weight sigmoid


@dataclass
class ReluLightningConfig(LightningConfig):
    name: str = "relu_lightning"
    block_score: str = "mean"


@dataclass
class PooledIndexerConfig(LightningConfig):
    name: str = "pooled"
    activation: str = "sigmoid"  # scores as in gated_lightning (sigmoid) or relu_lightning (relu)
    pool: int = 64  # keys pooled together, a multiple of attention.key_block
    pooling: str = "mean"  # of the index keys: mean, or max of each channel


@dataclass
class HierarchicalIndexerConfig(LightningConfig):
    name: str = "hierarchical"
    activation: str = "sigmoid"
    block_score: str = "mean"
    pool: int = 256  # keys pooled together for the coarse scores
    survivors: int = 64  # pooling blocks whose keys are scored exactly
    pooling: str = "mean"  # mean, max of each channel, or bound: no key scores above it (sigmoid)


@dataclass
class OracleIndexerConfig:
    name: str = "oracle"
    max_context: int = 16384  # longer contexts are refused: it costs as much as dense attention


@dataclass
class RandomIndexerConfig:
    name: str = "random"
    seed: int = 0  # of the hash


@dataclass
class StridedIndexerConfig:
    name: str = "strided"
    stride: int = 0  # n: every n-th block comes first; 0: n as small as the budget allows


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
class AdaptiveEntropyConfig:
    name: str = "adaptive_entropy"
    k: int = 2048  # budget at average entropy, window and sinks included
    k_min: int = 256
    k_max: int = 4096
    window: int = 128
    sinks: int = 64
    sign: str = "increasing"  # budget as the entropy grows: increasing or decreasing
    form: str = "ratio"  # ratio or logistic, of the distance from equal scores to its mean
    temperature: float = 1.0
    decay: float = 0.99


@dataclass
class TopPConfig:
    name: str = "top_p"
    p: float = 0.8  # share of the summed candidate scores that the chosen ones hold
    k_min: int = 256  # bounds of the budget, window and sinks included
    k_max: int = 4096
    window: int = 128
    sinks: int = 64


@dataclass
class LearnedBudgetConfig:
    name: str = "learned"
    k: int = 2048  # every query's budget before it learns, window and sinks included
    k_min: int = 256
    k_max: int = 4096
    window: int = 128
    sinks: int = 64
    mass: float = 0.9  # share of the dense attention that a budget should cover
    quantile: float = 0.5  # share of the queries whose budget should reach that
    hidden: int = 16  # width of its network
    rows: int = 4  # query tiles per sequence that it learns from, different ones every step
    weight: float = 1.0  # of its loss beside the language model's


@dataclass
class ScheduledBudgetConfig:
    name: str = "scheduled"
    k: int = 2048  # keys in the end, and always outside training, window and sinks included
    k_start: int = 0  # keys at step 0; 0: the whole context
    steps: int = 1000  # optimizer steps until k
    shape: str = "cosine"  # of the way from k_start to k: linear or cosine
    window: int = 128
    sinks: int = 64


@dataclass
class NoGateConfig:
    name: str = "none"


@dataclass
class ValueGateConfig:
    name: str = "value"
    granularity: str = "elementwise"  # elementwise or headwise (one scalar per head)
    activation: str = "sigmoid"  # of z = x W + b: sigmoid (0 to 1), silu (z sigmoid z), tanh
    bias: float = 0.0  # initial b; activation(b) is where the gate starts: sigmoid 0.5, tanh 1


@dataclass
class OutputGateConfig(ValueGateConfig):
    name: str = "output"


@dataclass
class DualGateConfig(ValueGateConfig):
    name: str = "dual"


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


@dataclass
class KlBiasObjectiveConfig(KlObjectiveConfig):
    name: str = "kl_bias"
    beta: float = 1.0  # attention logits of selected keys gain beta * log(score)
