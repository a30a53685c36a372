"""Records of what surrounds an attention: indexers, sparsity controllers, gates, objectives.

Targets are strings: listing them imports nothing heavy.
"""

from gsa_platform import Capabilities, Component, Trial, hookimpl

from . import configs as c


@hookimpl
def gsa_register_indexer() -> list[Component]:
    return [
        Component("none", "", c.NoIndexerConfig, "No indexer: for dense attention"),
        Component(
            "gated_lightning",
            "gsa_plugins.indexer.lightning:GatedLightningIndexer",
            c.GatedLightningConfig,
            "Sigmoid-gated lightning indexer (arXiv 2601.15305)",
        ),
        Component(
            "relu_lightning",
            "gsa_plugins.indexer.lightning:ReluLightningIndexer",
            c.ReluLightningConfig,
            "ReLU lightning indexer (DeepSeek-V3.2)",
        ),
        Component(
            "pooled",
            "gsa_plugins.indexer.pooled:PooledIndexer",
            c.PooledIndexerConfig,
            "Coarse lightning scores: one for all keys of a pooling block",
            trial=Trial(small={"pool": 16}),
        ),
        Component(
            "hierarchical",
            "gsa_plugins.indexer.hierarchical:HierarchicalIndexer",
            c.HierarchicalIndexerConfig,
            "Lightning scores coarse to fine: pooled keys, then exact inside the best blocks",
            trial=Trial(small={"pool": 16, "survivors": 7}, dense={"survivors": 1000}),
        ),
        Component(
            "oracle",
            "gsa_plugins.indexer.oracle:OracleIndexer",
            c.OracleIndexerConfig,
            "Control: chooses by the attention itself, whose q and k it sees; short contexts only",
        ),
        Component(
            "random",
            "gsa_plugins.indexer.positional:RandomIndexer",
            c.RandomIndexerConfig,
            "Control: keys drawn by a hash of positions; nothing to learn",
        ),
        Component(
            "strided",
            "gsa_plugins.indexer.positional:StridedIndexer",
            c.StridedIndexerConfig,
            "Control: every n-th block (arXiv 1904.10509); nothing to learn",
        ),
    ]


@hookimpl
def gsa_register_sparsity() -> list[Component]:
    return [
        Component("none", "", c.NoSparsityConfig, "No budget: for dense attention"),
        Component(
            "fixed",
            "gsa_plugins.sparsity.fixed:FixedBudget",
            c.FixedBudgetConfig,
            "The same number of keys for every query",
        ),
        Component(
            "adaptive_variance",
            "gsa_plugins.sparsity.adaptive_variance:AdaptiveVarianceBudget",
            c.AdaptiveVarianceConfig,
            "Budget from the variance of a query's own index scores (arXiv 2601.15305, Eq. 8)",
        ),
        Component(
            "adaptive_entropy",
            "gsa_plugins.sparsity.adaptive_entropy:AdaptiveEntropyBudget",
            c.AdaptiveEntropyConfig,
            "Budget from the entropy of a query's own index scores",
        ),
        Component(
            "top_p",
            "gsa_plugins.sparsity.top_p:TopPBudget",
            c.TopPConfig,
            "As many keys as hold a share p of the summed index scores",
        ),
        Component(
            "learned",
            "gsa_plugins.sparsity.learned:LearnedBudget",
            c.LearnedBudgetConfig,
            "Budget from a network that learns what covers a share of the dense attention",
        ),
        Component(
            "scheduled",
            "gsa_plugins.sparsity.scheduled:ScheduledBudget",
            c.ScheduledBudgetConfig,
            "A budget that shrinks over training, from dense to sparse",
            trial=Trial(small={"k_start": 80, "steps": 4}, dense={"k": 4096, "k_start": 4096}),
        ),
    ]


@hookimpl
def gsa_register_gate() -> list[Component]:
    return [
        Component("none", "", c.NoGateConfig, "No gate"),
        Component(
            "value",
            "gsa_plugins.gate:ProjectedGate",
            c.ValueGateConfig,
            "Gate on the values, G2 (arXiv 2505.06708)",
        ),
        Component(
            "output",
            "gsa_plugins.gate:ProjectedGate",
            c.OutputGateConfig,
            "Gate on the attention output, G1 (arXiv 2505.06708)",
        ),
        Component(
            "dual",
            "gsa_plugins.gate:ProjectedGate",
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
            "gsa_plugins.objective.kl:KlObjective",
            c.KlObjectiveConfig,
            "KL from the head-summed attention to the index distribution (DeepSeek-V3.2)",
            Capabilities(requires={"mass": "selected"}),
        ),
        Component(
            "bias",
            "gsa_plugins.objective.bias:BiasObjective",
            c.BiasObjectiveConfig,
            "beta * log(score) on the attention logits: the model's own loss trains the indexer",
            Capabilities(requires={"bias": ""}),
        ),
        Component(
            "kl_bias",
            "gsa_plugins.objective.kl_bias:KlBiasObjective",
            c.KlBiasObjectiveConfig,
            "Both: the KL to the unbiased attention, and log(score) on the logits",
            Capabilities(requires={"bias": "", "mass": "selected"}),
        ),
    ]
