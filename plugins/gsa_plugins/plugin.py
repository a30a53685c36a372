"""The first-party plugin: its records, and what it refuses before anything is built."""

from typing import Any

from gsa_platform import Capabilities, Component, Trial, hookimpl
from gsa_platform.components import SLOTS
from gsa_platform.errors import UserError, suggest

from . import configs as c
from .attention import checks
from .bench.records import gsa_register_benchmark
from .checks import problems
from .extensions import (
    gsa_register_callback,
    gsa_register_data,
    gsa_register_eval_task,
    gsa_register_report_section,
)
from .records import (
    gsa_register_gate,
    gsa_register_indexer,
    gsa_register_objective,
    gsa_register_sparsity,
)

GSA_PLUGIN_API = (1, 2)
__all__ = [
    "gsa_register_benchmark",
    "gsa_register_callback",
    "gsa_register_data",
    "gsa_register_eval_task",
    "gsa_register_report_section",
]


@hookimpl
def gsa_register_attention() -> list[Component]:
    return [
        Component(
            "dense",
            "gsa_plugins.attention.dense:DenseAttention",
            c.DenseAttentionConfig,
            "Causal softmax attention over every key (PyTorch SDPA, or FlashAttention-3)",
            Capabilities(),
            trial=Trial(dense={}),
        ),
        Component(
            "sliding_window",
            "gsa_plugins.attention.sliding_window:SlidingWindowAttention",
            c.SlidingWindowConfig,
            "The most recent keys and the first ones (arXiv 2004.05150, 2309.17453)",
            Capabilities(),
            trial=Trial(small={"window": 24, "sinks": 4}, dense={"window": 4096}),
        ),
        Component(
            "xformers",
            "gsa_plugins.attention.xformers_dense:XformersAttention",
            c.XformersConfig,
            "Dense or sliding window, xformers memory_efficient_attention (arXiv 2112.05682)",
            Capabilities(
                devices=("cuda",),
                head_dims=tuple(range(8, 257, 8)),
                deterministic=False,
                needs=("xformers",),
                reasons={
                    "devices": "xformers has CUDA operators of memory_efficient_attention only",
                    "deterministic": "the flash backward adds in no fixed order",
                },
            ),
            details="gsa_plugins.attention.xformers_ops:status",
            trial=Trial(small={"window": 24}, dense={"window": 0}),
        ),
        Component(
            "gsa",
            "gsa_plugins.attention.gsa:GatedSparseAttention",
            c.GsaAttentionConfig,
            "Softmax attention over selected keys, linear memory (arXiv 2601.15305)",
            Capabilities(modes=("token", "block", "tile"), mass=True, bias=True, fused_gate=True),
            trial=Trial(reference={"impl": "reference"}),
        ),
        Component(
            "flex",
            "gsa_plugins.attention.flex:FlexSelectedAttention",
            c.FlexConfig,
            "Selected keys through PyTorch FlexAttention (arXiv 2412.05496)",
            Capabilities(
                modes=("block", "tile"),
                reasons={
                    "modes": "a mask of single keys chosen by single queries is T x S",
                    "mass": "FlexAttention returns no attention probabilities",
                    "bias": "its kernel sees key positions, not the slots that carry the bias",
                },
            ),
        ),
        Component(
            "xformers_sparse",
            "gsa_plugins.attention.xformers_sparse:XformersSparseAttention",
            c.XformersSparseConfig,
            "Selected keys through xformers BlockSparseTensor, plain PyTorch, for comparison",
            Capabilities(
                modes=("tile",),
                mass=True,
                bias=True,
                needs=("xformers",),
                reasons={"modes": "its square cells must divide C and R, so R is at least 16"},
            ),
        ),
    ]


# Settings with a fixed set of values, by (slot, setting).
CHOICES = {
    ("attention", "backend"): ("auto", "cudnn", "flash", "efficient", "math", "fa3"),
    ("attention", "selection_heads"): ("shared", "kv"),
    ("indexer", "scale"): ("rsqrt", "none"),
    ("indexer", "key_dtype"): ("auto", "fp8"),
    ("indexer", "block_score"): ("mean", "max"),
    ("indexer", "activation"): ("sigmoid", "relu"),
    ("indexer", "pooling"): ("mean", "max", "bound"),
    ("sparsity", "sign"): ("decreasing", "increasing"),
    ("sparsity", "form"): ("ratio", "logistic"),
    ("sparsity", "shape"): ("linear", "cosine"),
    ("gate", "granularity"): ("elementwise", "headwise"),
    ("gate", "activation"): ("sigmoid", "silu", "tanh"),
    ("objective", "distribution"): ("softmax", "log"),
}


@hookimpl
def gsa_validate(config: Any) -> None:
    """Refuse settings that the first-party components would refuse, before anything is built."""
    for (slot, key), choices in CHOICES.items():
        value = config[slot].get(key)
        if _ours(slot, config[slot].name) and value is not None and value not in choices:
            raise UserError(
                f"{slot}.{key}={value} is not one of {', '.join(choices)}."
                f"{suggest(str(value), choices)}"
            )
    checks.refuse(config)
    ours = {slot for slot in SLOTS if _ours(slot, config[slot].name)}
    if found := list(problems(config, ours)):
        raise UserError("\n".join(found))


def _ours(slot: str, name: str) -> bool:
    """Whether a component name is one of this package's."""
    records = {
        "attention": gsa_register_attention,
        "indexer": gsa_register_indexer,
        "sparsity": gsa_register_sparsity,
        "gate": gsa_register_gate,
        "objective": gsa_register_objective,
    }
    return name in [component.name for component in records[slot]()]
