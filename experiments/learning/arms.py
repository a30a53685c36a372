"""The arms of the two studies, as overrides of the platform's command line."""

# What the indexer can learn from, and what a choice of as many keys covers without learning.
INDEXERS = {
    "kl": [],
    "bias": ["objective=bias"],
    "kl_bias": ["objective=kl_bias"],
    "frozen": ["objective=none"],
    "no_norm_kl": ["indexer.qk_norm=false"],
    "relu_kl": ["indexer=relu_lightning"],
    "relu_no_norm_kl": ["indexer=relu_lightning", "indexer.qk_norm=false"],
    "no_rope_kl": ["indexer.rope=false"],
    "pooled_kl": ["indexer=pooled"],
    "hierarchical_kl": ["indexer=hierarchical", "indexer.pool=64"],  # survivors follow k
    "random": ["indexer=random", "objective=none"],
    "strided": ["indexer=strided", "objective=none"],
    "oracle": ["indexer=oracle", "objective=none"],
    "dense": ["attention=dense"],
}
ON_REQUEST = ("no_norm_kl", "relu_no_norm_kl", "pooled_kl", "hierarchical_kl", "dense")
DEFAULT_INDEXERS = [n for n in INDEXERS if n not in ON_REQUEST]


def budgets() -> dict[str, list[str]]:
    """fixed, and adaptive budgets of both statistics, signs and forms."""
    arms = {"fixed": ["sparsity=fixed"]}
    for statistic in ("variance", "entropy"):
        for sign in ("decreasing", "increasing"):
            for form in ("ratio", "logistic"):
                arms[f"{statistic}_{sign}_{form}"] = [
                    f"sparsity=adaptive_{statistic}",
                    f"sparsity.sign={sign}",
                    f"sparsity.form={form}",
                ]
    return arms


BUDGETS = budgets()


def budget_overrides(arm: str, k: int, block: int, forced: int) -> list[str]:
    """k keys at the running mean, between a quarter and four times as many."""
    overrides = [*BUDGETS[arm], f"sparsity.k={k}"]
    if arm != "fixed":
        low = max(-(-forced // block) * block, k // 4 // block * block)
        overrides += [f"sparsity.k_min={low}", f"sparsity.k_max={4 * k}"]
    return overrides
