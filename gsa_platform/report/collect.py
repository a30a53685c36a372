"""Gather what a finished run has to say: figures for the summary, the tracker and result.json."""

from __future__ import annotations

import math
import shlex
import statistics
from typing import Any

import lightning as L
from omegaconf import DictConfig

from gsa_platform import registry
from gsa_platform.check import training_flops_per_token
from gsa_platform.components import SLOTS
from gsa_platform.data.datamodule import TextDataModule
from gsa_platform.diagnostics.device import device_name
from gsa_platform.metrics.peak import measured_matmul_flops, model_flops_utilisation, peak_flops
from gsa_platform.module import LanguageModel
from gsa_platform.report.section import FinishedRun, sections

# Numbers of the closing summary that no step or validation logs.
FINAL = (
    "wall_s",
    "mfu",
    "peak_memory_gb",
    "step_s",
    "bits_per_byte",
    "sparse_attention_s",
    "dense_attention_s",
    "dense_step_s",
)


def collect_result(
    cfg: DictConfig,
    module: LanguageModel,
    data: TextDataModule,
    trainer: L.Trainer,
    peak_gb: float,
    cost: dict[str, Any],
    wall_s: float,
) -> dict[str, Any]:
    """{loss, tokens_per_s, checkpoint, final: numbers to log, summary: for render_summary}."""
    first = module.val_history[0] if module.val_history else {}
    last = module.val_history[-1] if module.val_history else {}
    world, device = trainer.world_size, trainer.strategy.root_device
    tokens_per_step = cfg.context * cfg.train.batch_size * cfg.train.accumulate * world
    # The first step pays for start-up; the median of the rest is the steady state.
    steady = module.step_seconds[1:] or module.step_seconds
    step_s = statistics.median(steady) if steady else None
    rate = tokens_per_step / step_s if step_s else None
    keys = last.get("keys_mean")
    flops = training_flops_per_token(cfg, data.vocab_size, module.model, keys)
    if device.type == "cuda":
        peak = peak_flops(device_name(device))
    else:
        peak = measured_matmul_flops()
    mfu = model_flops_utilisation(rate, flops, peak, world) if rate else None
    losses = module.loss_history
    loss = losses[-1] if losses else None
    summary: dict[str, Any] = {
        "name": cfg.name,
        "model": f"{cfg.model.name}, {parameters(module):,} parameters; {slots_line(cfg)}",
        "data": f"{cfg.data.name}, context {cfg.context:,}, tokenizer {cfg.data.tokenizer}",
        "steps": trainer.global_step,
        "tokens": trainer.global_step * tokens_per_step,
        "wall_s": wall_s,
        "loss_first": losses[0] if losses else None,
        "loss": loss,
        "val_loss": last.get("loss"),
        "perplexity": last.get("perplexity"),
        "tokens_per_s": rate,
        "mfu": mfu,
        "peak_memory_gb": peak_gb,
        "step_s": step_s,
        "keys_mean": keys,
        "keys_fraction": last.get("keys_fraction"),
        "budget": cfg.sparsity.get("k"),
        "first_token_attention": module.first_token_layers,
        "first_token_uniform": last.get("first_token_uniform"),
        "gate_value_mean": last.get("gate_value_mean"),
        "gate_output_mean": last.get("gate_output_mean"),
        "recall_first": first.get("recall") if len(module.val_history) > 1 else None,
        "recall_last": last.get("recall"),
        "recall_best": last.get("recall_best"),
        "index_saturated_max": last.get("index_saturated_max"),
        "run_dir": cfg.run_dir,
        "notes": list(cfg.notes),
        **cost,
    }
    if "loss" in last:
        summary["bits_per_byte"] = last["loss"] / math.log(2) / data.bytes_per_token
    if cost and step_s:
        summary["dense_step_s"] = dense_step_seconds(cfg, module, step_s, cost)
    if cfg.tracking.name == "mlflow":
        uri = shlex.quote(cfg.tracking.uri)
        summary["mlflow_command"] = f"mlflow ui --backend-store-uri {uri}"
    run = FinishedRun(summary, cfg, module, data, trainer)
    summary["sections"] = sections(run, registry.get(cfg.get("plugins_path")))
    final = {k: float(v) for k, v in summary.items() if isinstance(v, int | float) and k in FINAL}
    return {
        "loss": loss,
        "val_loss": last.get("loss"),
        "tokens_per_s": rate,
        "checkpoint": f"{cfg.run_dir}/checkpoints/last.ckpt",
        "final": final,
        "summary": summary,
    }


def slots_line(cfg: Any) -> str:
    """`attention=gsa indexer=... sparsity=... gate=... objective=...`."""
    return " ".join(f"{slot}={cfg[slot].name}" for slot in SLOTS)


def parameters(module: LanguageModel) -> int:
    return sum(p.numel() for p in module.model.parameters())


def dense_step_seconds(
    cfg: DictConfig, module: LanguageModel, step_s: float, cost: dict[str, Any]
) -> float | None:
    """The measured step with each sparse layer's attention exchanged for the dense one's time."""
    sparse = sum(block.attention.indexer is not None for block in module.model.blocks)
    if not sparse:
        return None
    sequences = cfg.train.batch_size * cfg.train.accumulate
    extra = cost["dense_attention_s"] - cost["sparse_attention_s"]
    return step_s + sparse * sequences * extra
