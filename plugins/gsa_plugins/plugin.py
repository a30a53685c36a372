"""The records of every first-party component. Targets are strings: nothing heavy is imported."""

from typing import Any

from gsa_platform import Capabilities, Component, Trial, hookimpl
from gsa_platform.errors import UserError, suggest

from . import configs as c
from .attention import checks
from .extensions import (
    gsa_register_callback,
    gsa_register_data,
    gsa_register_eval_task,
    gsa_register_report_section,
)

GSA_PLUGIN_API = (1, 1)
__all__ = [
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
            Capabilities(modes=("token", "block", "tile"), mass=True, bias=True),
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


@hookimpl
def gsa_register_indexer() -> list[Component]:
    return [
        Component("none", "", c.NoIndexerConfig, "No indexer: for dense attention"),
        Component(
            "gated_lightning",
            "gsa_plugins.indexer:GatedLightningIndexer",
            c.GatedLightningConfig,
            "Sigmoid-gated lightning indexer (arXiv 2601.15305)",
        ),
        Component(
            "relu_lightning",
            "gsa_plugins.indexer:ReluLightningIndexer",
            c.ReluLightningConfig,
            "ReLU lightning indexer (DeepSeek-V3.2)",
        ),
    ]


@hookimpl
def gsa_register_sparsity() -> list[Component]:
    return [
        Component("none", "", c.NoSparsityConfig, "No budget: for dense attention"),
        Component(
            "fixed",
            "gsa_plugins.sparsity:FixedBudget",
            c.FixedBudgetConfig,
            "The same number of keys for every query",
        ),
        Component(
            "adaptive_variance",
            "gsa_plugins.sparsity:AdaptiveVarianceBudget",
            c.AdaptiveVarianceConfig,
            "Budget from the variance of a query's own index scores (arXiv 2601.15305, Eq. 8)",
        ),
    ]


@hookimpl
def gsa_register_gate() -> list[Component]:
    return [
        Component("none", "", c.NoGateConfig, "No gate"),
        Component(
            "value",
            "gsa_plugins.gate:SigmoidGate",
            c.ValueGateConfig,
            "Sigmoid gate on the values, G2 (arXiv 2505.06708)",
        ),
        Component(
            "output",
            "gsa_plugins.gate:SigmoidGate",
            c.OutputGateConfig,
            "Sigmoid gate on the attention output, G1 (arXiv 2505.06708)",
        ),
        Component(
            "dual",
            "gsa_plugins.gate:SigmoidGate",
            c.DualGateConfig,
            "Both gates, G1 and G2 (arXiv 2601.15305)",
        ),
    ]


@hookimpl
def gsa_register_objective() -> list[Component]:
    return [
        Component("none", "", c.NoObjectiveConfig, "The indexer gets no training signal"),
        Component(
            "kl",
            "gsa_plugins.objective:KlObjective",
            c.KlObjectiveConfig,
            "KL from the head-summed attention to the index distribution (DeepSeek-V3.2)",
            Capabilities(requires={"mass": "selected"}),
        ),
        Component(
            "bias",
            "gsa_plugins.objective:BiasObjective",
            c.BiasObjectiveConfig,
            "beta * log(score) on the attention logits: the model's own loss trains the indexer",
            Capabilities(requires={"bias": ""}),
        ),
    ]


# Settings with a fixed set of values, by (slot, setting).
CHOICES = {
    ("attention", "backend"): ("auto", "cudnn", "flash", "efficient", "math", "fa3"),
    ("attention", "selection_heads"): ("shared", "kv"),
    ("indexer", "scale"): ("rsqrt", "none"),
    ("indexer", "block_score"): ("mean", "max"),
    ("sparsity", "sign"): ("decreasing", "increasing"),
    ("sparsity", "form"): ("ratio", "logistic"),
    ("gate", "granularity"): ("elementwise", "headwise"),
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
    attention, indexer, sparsity, objective = (
        config[slot] for slot in ("attention", "indexer", "sparsity", "objective")
    )
    if attention.get("selection_heads") == "kv":
        kv_heads = config.model.n_kv_heads
        if _ours("indexer", indexer.name) and indexer.get("heads", kv_heads) % kv_heads:
            raise UserError(
                f"attention.selection_heads=kv splits the index heads over {kv_heads} key-value "
                f"heads: indexer.heads={indexer.heads} is not a multiple of {kv_heads}"
            )
    if sparsity.name == "adaptive_variance" and not sparsity.k_min <= sparsity.k <= sparsity.k_max:
        raise UserError(
            f"sparsity.k={sparsity.k} must lie between sparsity.k_min={sparsity.k_min} and "
            f"sparsity.k_max={sparsity.k_max}"
        )
    if objective.name == "kl" and objective.dense_rows == 0:
        if not objective.selected:
            raise UserError(
                "objective kl has nothing to learn from: set objective.selected=true or "
                "objective.dense_rows above 0"
            )
        if objective.warmup_steps:
            raise UserError("objective.warmup_steps needs objective.dense_rows above 0")


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
