"""What the first-party components refuse before anything is built. No torch here."""

from collections.abc import Iterator
from typing import Any

from .granularity import granularity

# (slot, setting): (text of what is allowed, whether a value is).
RANGES = {
    ("indexer", "heads"): ("at least 1", lambda x: x >= 1),
    ("indexer", "dim"): ("at least 1", lambda x: x >= 1),
    ("indexer", "pool"): ("at least 1", lambda x: x >= 1),
    ("indexer", "survivors"): ("at least 1", lambda x: x >= 1),
    ("indexer", "max_context"): ("at least 1", lambda x: x >= 1),
    ("indexer", "stride"): ("at least 0", lambda x: x >= 0),
    ("sparsity", "temperature"): ("above 0", lambda x: x > 0),
    ("sparsity", "decay"): ("at least 0 and below 1", lambda x: 0 <= x < 1),
    ("sparsity", "p"): ("above 0 and at most 1", lambda x: 0 < x <= 1),
    ("sparsity", "k_min"): ("at least 1", lambda x: x >= 1),
    ("sparsity", "mass"): ("above 0 and below 1", lambda x: 0 < x < 1),
    ("sparsity", "quantile"): ("above 0 and below 1", lambda x: 0 < x < 1),
    ("sparsity", "hidden"): ("at least 1", lambda x: x >= 1),
    ("sparsity", "rows"): ("at least 1", lambda x: x >= 1),
    ("sparsity", "weight"): ("at least 0", lambda x: x >= 0),
    ("sparsity", "steps"): ("at least 1", lambda x: x >= 1),
    ("sparsity", "k_start"): ("at least 0", lambda x: x >= 0),
    ("objective", "weight"): ("at least 0", lambda x: x >= 0),
    ("objective", "warmup_steps"): ("at least 0", lambda x: x >= 0),
    ("objective", "dense_rows"): ("at least 0", lambda x: x >= 0),
    ("objective", "beta"): ("above 0", lambda x: x > 0),
}
CONTROLS = ("oracle", "random", "strided")  # indexers with nothing to learn


def problems(config: Any, ours: set[str]) -> Iterator[str]:
    """One text for each problem of the slots in `ours`, whose components are first-party."""
    for (slot, key), (allowed, good) in RANGES.items():
        value = config[slot].get(key)
        if slot in ours and value is not None and not good(value):
            yield f"{slot}.{key}={value} must be {allowed}."
    if "indexer" in ours and config.indexer.name != "none":
        yield from _indexer(config)
    if "sparsity" in ours:
        yield from _sparsity(config)
    if "objective" in ours:
        yield from _objective(config.objective)


def _indexer(config: Any) -> Iterator[str]:
    indexer, objective = config.indexer, config.objective
    if indexer.get("rope") and indexer.dim % 2:
        yield (
            f"indexer.dim={indexer.dim} must be even for rotary index keys. "
            f"Type indexer.dim={indexer.dim + 1}, or indexer.rope=false."
        )
    kv_heads = config.model.n_kv_heads
    if config.attention.get("selection_heads") == "kv" and indexer.get("heads", 0) % kv_heads:
        yield (
            f"attention.selection_heads=kv splits the index heads over {kv_heads} key-value "
            f"heads: indexer.heads={indexer.heads} is not a multiple of {kv_heads}"
        )
    if indexer.name in CONTROLS and objective.name != "none":
        yield (
            f"indexer={indexer.name} has no parameters, so objective={objective.name} has nothing "
            "to train. Type objective=none, or another indexer."
        )
    if indexer.name == "oracle" and config.context > indexer.max_context:
        yield (
            f"indexer=oracle costs as much as dense attention and takes contexts up to "
            f"indexer.max_context={indexer.max_context}, not context={config.context}. "
            f"Type indexer.max_context={config.context} if you mean it, or another indexer."
        )
    if indexer.get("pooling") == "bound":
        yield from _bound(indexer)
    if indexer.get("pool"):
        yield from _pool(config)


def _bound(indexer: Any) -> Iterator[str]:
    """Bounds prune for exact scores inside what is left, of weights that are never negative."""
    if "survivors" not in indexer:
        yield (
            "indexer.pooling=bound bounds the scores of single blocks, and "
            f"indexer={indexer.name} has none. "
            "Type indexer=hierarchical, or indexer.pooling=mean."
        )
    elif indexer.activation != "sigmoid":
        yield (
            f"indexer.pooling=bound needs head weights that are never negative, and those of "
            f"indexer.activation={indexer.activation} may be. Type indexer.activation=sigmoid, or "
            "indexer.pooling=mean."
        )


def _pool(config: Any) -> Iterator[str]:
    """Pooling blocks line up with key blocks, and enough of them survive to fill a budget."""
    indexer, sparsity = config.indexer, config.sparsity
    block = _key_block(config.attention)
    if indexer.pool % block:
        nearest = -(-indexer.pool // block) * block
        yield (
            f"indexer.pool={indexer.pool} is not a multiple of the {block} keys that are chosen "
            f"together (attention.key_block). Type indexer.pool={nearest}."
        )
        return
    keys = _largest_budget(config) - sparsity.get("window", 0) - sparsity.get("sinks", 0)
    if "survivors" not in indexer or keys <= 0:
        return
    # The first and the last pooling block may hold a single candidate each.
    needed = min(-(-keys // indexer.pool) + 2, -(-config.context // indexer.pool))
    if indexer.survivors < needed:
        yield (
            f"indexer.survivors={indexer.survivors} pooling blocks of {indexer.pool} keys cannot "
            f"fill every budget (up to {_largest_budget(config)} keys). "
            f"Type indexer.survivors={needed} or more, or a larger indexer.pool."
        )


def _key_block(attention: Any) -> int:
    """C, or 1 where another check reports the granularity."""
    try:
        return granularity(
            attention.get("mode", "token"),
            attention.get("key_block", 0),
            attention.get("query_tile", 0),
        )[0]
    except ValueError:
        return 1


def _largest_budget(config: Any) -> int:
    sparsity = config.sparsity
    budgets = [sparsity.get(name) or 0 for name in ("k", "k_max", "k_start")]
    if sparsity.get("k_start") == 0:
        budgets.append(config.context)
    return min(max(budgets), config.context)


def _sparsity(config: Any) -> Iterator[str]:
    sparsity = config.sparsity
    block = _key_block(config.attention)
    forced = sparsity.get("window", 0) + -(-sparsity.get("sinks", 0) // block) * block
    if sparsity.name == "top_p":
        if sparsity.k_min > sparsity.k_max:
            yield f"sparsity.k_min={sparsity.k_min} is above sparsity.k_max={sparsity.k_max}."
        elif sparsity.k_min < forced:
            yield (
                f"sparsity.k_min={sparsity.k_min} is below what is always attended: window and "
                f"sinks are {forced} keys. Type sparsity.k_min={forced} or more."
            )
    elif "k_min" in sparsity and not sparsity.k_min <= sparsity.k <= sparsity.k_max:
        yield (
            f"sparsity.k={sparsity.k} must lie between sparsity.k_min={sparsity.k_min} and "
            f"sparsity.k_max={sparsity.k_max}"
        )
    if sparsity.name == "scheduled" and 0 < sparsity.k_start < sparsity.k:
        yield (
            f"sparsity.k_start={sparsity.k_start} is below sparsity.k={sparsity.k}: a schedule "
            "goes from dense to sparse. Type sparsity.k_start=0 to start with every key."
        )


def _objective(objective: Any) -> Iterator[str]:
    if objective.get("dense_rows") != 0:
        return
    if not objective.selected:
        yield (
            f"objective {objective.name} has nothing to learn from: set objective.selected=true "
            "or objective.dense_rows above 0"
        )
    if objective.warmup_steps:
        yield "objective.warmup_steps needs objective.dense_rows above 0"
