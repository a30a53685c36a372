"""`check`: build on the meta device and say what a run would cost, without training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from omegaconf import DictConfig

from gsa_platform.model.flops import (
    TokenFlops,
    flops_per_token,
    mean_keys,
    training_memory,
)
from gsa_platform.model.layer_pattern import expand_pattern


def sparse_layers(cfg: Any) -> int:
    """How many layers select keys."""
    if cfg.indexer.name == "none":
        return 0
    names = expand_pattern(list(cfg.model.layer_pattern), cfg.model.n_layers)
    return sum(name in ("*", cfg.attention.name) for name in names)


def token_flops(cfg: Any, vocab: int, model: Any, keys: float | None = None) -> TokenFlops:
    """FLOPs per token of the configured model; keys: measured keys per query, else the budget's.

    model: the built Transformer (on any device), which knows the granularity in use.
    """
    n_sparse = sparse_layers(cfg)
    budget = cfg.sparsity.get("k", cfg.sparsity.get("k_max"))
    if keys is None and budget is not None:
        keys = mean_keys(cfg.context, budget)
    indexer = 0
    if n_sparse:
        layer = next(b.attention for b in model.blocks if b.attention.indexer is not None)
        spec = layer.attention.selection_spec(layer.sparsity)
        indexer = layer.indexer.flops(cfg.context, spec)
    flops = flops_per_token(
        cfg.model,
        cfg.context,
        vocab,
        keys if n_sparse else None,
        n_sparse,
        indexer,
        gate_parameters(cfg),
    )
    return replace(flops, attention=flops.attention - _not_dense(cfg, model))


def _not_dense(cfg: Any, model: Any) -> int:
    """FLOPs per token by which layers that limit their own keys cost less than dense ones."""
    saved = 0.0
    for block in model.blocks:
        layer = block.attention
        keys = layer.attention.mean_keys(cfg.context) if layer.indexer is None else None
        if keys is not None:
            saved += 4 * layer.dims.n_heads * layer.dims.head_dim * (cfg.context / 2 - keys)
    return round(saved)


def gate_parameters(cfg: Any) -> int:
    """Weights of one layer's gate projections."""
    m = cfg.model
    width = m.head_dim or m.d_model // m.n_heads
    per_head = width if cfg.gate.get("granularity", "elementwise") == "elementwise" else 1
    heads = {"value": m.n_kv_heads, "output": m.n_heads, "dual": m.n_kv_heads + m.n_heads}
    return m.d_model * per_head * heads.get(cfg.gate.name, 0)


def training_flops_per_token(cfg: Any, vocab: int, model: Any, keys: float | None) -> float:
    return float(token_flops(cfg, vocab, model, keys).training)


def check(cfg: DictConfig) -> dict[str, Any]:
    """Print and return parameters, FLOPs per token (sparse and dense) and a memory estimate."""
    import torch

    from gsa_platform import registry
    from gsa_platform.data.tokenizers import build_tokenizer
    from gsa_platform.model.transformer import Transformer

    vocab = build_tokenizer(cfg.data.tokenizer).vocab_size
    with torch.device("meta"):
        model = Transformer(cfg, vocab, registry.get(cfg.get("plugins_path")))
    groups: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        kind = "other"
        for key in ("embedding", "indexer", "sparsity", "gate.", "head", "ffn", "attention"):
            if key in name:
                kind = key.rstrip(".")
                break
        groups[kind] = groups.get(kind, 0) + parameter.numel()
    total = sum(groups.values())
    sparse = token_flops(cfg, vocab, model)
    dense = flops_per_token(cfg.model, cfg.context, vocab, None, 0, 0, gate_parameters(cfg))
    memory = training_memory(
        cfg.model,
        cfg.context,
        vocab,
        cfg.train.batch_size,
        cfg.trainer.precision,
        cfg.train.activation_checkpointing,
        cfg.train.ce_chunk,
        total,
    )
    result = {
        "parameters": total,
        "parameters_by_part": groups,
        "flops_per_token": sparse.training,
        "flops_per_token_dense": dense.training,
        "memory_bytes": memory.total,
    }
    print(render(cfg, result, sparse, dense, memory, model))
    return result


def render(
    cfg: Any,
    result: dict[str, Any],
    sparse: TokenFlops,
    dense: TokenFlops,
    memory: Any,
    model: Any,
) -> str:

    def mega(forward: int) -> str:
        return f"{3 * forward / 1e6:,.1f} M"

    parts = ", ".join(f"{k} {v:,}" for k, v in result["parameters_by_part"].items())
    step = sparse.training * step_tokens(cfg)
    flops = f"{step / 1e12:,.2f} T" if step >= 1e11 else f"{step / 1e9:,.2f} G"
    size, unit = (1e9, "GB") if memory.total >= 1e8 else (1e6, "MB")
    names = ("parameters", "gradients", "optimizer", "activations", "loss")
    shares = ", ".join(f"{name} {getattr(memory, name) / size:.2f}" for name in names)
    lines = [
        f"model        {cfg.model.name}, context {cfg.context:,}",
        *(f"             {line}" for line in describe(cfg, model)),
        f"parameters   {result['parameters']:,} ({parts})",
        f"FLOPs/token  {sparse.training / 1e6:,.1f} M to train "
        f"(attention {mega(sparse.attention)}, indexer {mega(sparse.indexer)})",
        f"  if dense   {dense.training / 1e6:,.1f} M "
        f"(attention {mega(dense.attention)}): {dense.training / sparse.training:.2f} x",
        f"FLOPs/step   {flops} for {step_tokens(cfg):,} tokens",
        f"memory       {memory.total / size:.2f} {unit} estimated per device: {shares}",
    ]
    return "\n".join(lines)


def describe(cfg: Any, model: Any) -> list[str]:
    """The implementations a run of this configuration would use, where this machine can tell.

    Raises UserError for one that was asked for by name and cannot run.
    """
    import torch

    from gsa_platform.capabilities import device_kind

    kind = device_kind(cfg)
    if kind == "cuda" and not torch.cuda.is_available():
        return [f"attention={cfg.attention.name}: no CUDA device here to choose kernels for"]
    return list(model.describe(kind))


def step_tokens(cfg: Any) -> int:
    """Tokens of one optimizer step over all devices."""
    devices = cfg.trainer.devices if isinstance(cfg.trainer.devices, int) else 1
    micro = cfg.context * cfg.train.batch_size * cfg.train.accumulate
    return int(micro * max(1, devices) * cfg.trainer.num_nodes)
