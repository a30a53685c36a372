"""The records of every first-party component. Targets are strings: nothing heavy is imported."""

from gsa_platform import Capabilities, Component, hookimpl

from . import configs as c

GSA_PLUGIN_API = (1, 0)


@hookimpl
def gsa_register_attention() -> list[Component]:
    return [
        Component(
            "dense",
            "gsa_plugins.dense:DenseAttention",
            c.DenseAttentionConfig,
            "Causal softmax attention over every key (PyTorch SDPA)",
            Capabilities(),
        ),
        Component(
            "gsa",
            "gsa_plugins.gsa:GatedSparseAttention",
            c.GsaAttentionConfig,
            "Softmax attention over selected keys, linear memory (arXiv 2601.15305)",
            Capabilities(modes=("token", "block", "tile")),
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
        ),
        Component(
            "bias",
            "gsa_plugins.objective:BiasObjective",
            c.BiasObjectiveConfig,
            "beta * log(score) on the attention logits: the language-model loss trains the indexer",
        ),
    ]
