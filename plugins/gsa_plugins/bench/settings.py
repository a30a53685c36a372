"""Options of the benchmarks. No torch here: completion reads this file."""

from dataclasses import dataclass, field

from gsa_platform import BenchmarkSettings

_BESIDE = {"choices": ("flex", "flex_kernel", "fla", "attn_gym", "xformers")}
_DENSE = {"choices": ("cudnn", "flash", "efficient", "math", "fa3", "xformers")}
_MODES = {"choices": ("tile", "block", "token")}
_INPUTS = {"choices": ("random", "smooth", "checkpoint")}
_POOLINGS = {"choices": ("mean", "max", "bound")}
_KEYS = {"choices": ("auto", "bf16", "fp8")}
_DEVICES = {"choices": ("auto", "cuda", "cpu")}
_DTYPES = {"choices": ("auto", "bfloat16", "float16", "float32")}
_IMPLS = {"choices": ("auto", "triton", "eager")}
_PASSES = {"choices": ("forward", "forward_backward", "decode")}


def _both() -> list[str]:
    return ["forward", "forward_backward"]


@dataclass
class LayerBenchSettings(BenchmarkSettings):
    """What the benchmarks of a layer share; counts are keys, queries or heads."""

    mode: str = field(default="tile", metadata=_MODES)
    seq_len: list[int] = field(default_factory=list)  # default 131072 on a GPU, 1024 2048 on a CPU
    batch: list[int] = field(default_factory=lambda: [1])
    heads: int = 0  # query heads; 0 = 16 on a GPU, 4 on a CPU
    kv_heads: list[int] = field(default_factory=lambda: [0])  # 0 = 4 on a GPU, 2 on a CPU
    head_dim: int = 0  # 0 = 128 on a GPU, 32 on a CPU
    key_block: int = 0  # C, keys chosen together; 0 = 64, in token mode 1
    query_tile: list[int] = field(default_factory=lambda: [0])  # R; 0 = 64 in tile mode, else 1
    k: int = 0  # keys a query may attend; 0 = 2048 on a GPU, 512 on a CPU
    window: int = 128  # most recent keys, always attended
    sinks: int = 64  # first keys, always attended
    index_heads: int = 4
    index_dim: int = 64
    # of index keys: auto, that of the queries; bf16; fp8, one byte a channel
    key_dtype: list[str] = field(default_factory=lambda: ["auto"], metadata=_KEYS)
    inputs: str = field(default="random", metadata=_INPUTS)
    memory: int = 256  # positions that index queries of --inputs smooth remember
    checkpoint: str = ""  # run folder, .ckpt or captured .pt file, for --inputs checkpoint
    # layers to capture; -1 = the middle one with an indexer
    layer: list[int] = field(default_factory=lambda: [-1])
    sequences: int = 1  # validation texts to capture, which a batch takes in turn
    device: str = field(default="auto", metadata=_DEVICES)
    dtype: str = field(default="auto", metadata=_DTYPES)
    impl: str = field(default="auto", metadata=_IMPLS)
    seconds: float = 1.0  # of each timing, about


@dataclass
class AttentionBenchSettings(LayerBenchSettings):
    passes: list[str] = field(default_factory=_both, metadata=_PASSES)
    decode_batch: list[int] = field(default_factory=lambda: [1, 8, 64])  # sequences at once
    longest_backward: int = 262144  # tokens, of the pass forward_backward
    dense: list[str] = field(default_factory=list, metadata=_DENSE)  # opponents
    beside: list[str] = field(default_factory=list, metadata=_BESIDE)  # same selection


@dataclass
class IndexerBenchSettings(LayerBenchSettings):
    pooling: list[str] = field(default_factory=lambda: ["mean", "bound"], metadata=_POOLINGS)
    pool: list[int] = field(default_factory=lambda: [128, 256, 512])  # 0: leave it out
    survivors: list[int] = field(default_factory=lambda: [8, 16, 32, 64])
    survivor_keys: list[int] = field(default_factory=list)  # keys in them, instead of survivors
    queries: int = 0  # so many last ones only; 0 = all
    mass_rows: int = 64  # query tiles whose dense attention tells the mass covered
    dense_rows: int = 8  # query tiles of the KL over every candidate; 0 = no KL


@dataclass
class CaptureSettings(BenchmarkSettings):
    checkpoint: str = ""  # run folder or .ckpt
    layer: int = -1  # -1 = the middle one with an indexer
    tokens: int = 0  # of the text; 0 = the context the model was trained with
    sequences: int = 1  # texts
    tensors: str = "captured.pt"  # file to write
    device: str = field(default="auto", metadata=_DEVICES)
