"""Train one resolved configuration: build, fit, close."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig

from gsa_platform import registry
from gsa_platform.callbacks import build_callbacks
from gsa_platform.checkpoint import LastCheckpoint, check_checkpoint
from gsa_platform.data.build import build_data
from gsa_platform.data.datamodule import TextDataModule
from gsa_platform.diagnostics.cost import measure_attention
from gsa_platform.diagnostics.device import check_compiler, device_name, peak_memory_gb
from gsa_platform.module import LanguageModel
from gsa_platform.progress import progress_callback, say
from gsa_platform.report.collect import collect_result, slots_line
from gsa_platform.report.summary import WIDTH, render_summary
from gsa_platform.tracking import build_loggers


def train(cfg: DictConfig, data: TextDataModule | None = None) -> dict[str, Any]:
    """Train, validate and summarise; returns the figures of the closing summary.

    `data` is prepared data, if the caller has it. Runs in every worker; only rank 0 logs and
    prints. Raises UserError before the first step for data or settings that cannot work.
    """
    quiet_lightning()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    if cfg.train.deterministic:
        torch.use_deterministic_algorithms(True)
    if data is None:
        data = build_data(cfg)
        data.prepare_data()
    began = time.perf_counter()  # whether the text was tokenised before says nothing of the run
    plugins = registry.get(cfg.get("plugins_path"))
    module = LanguageModel(cfg, data.vocab_size, plugins)
    resumed_at = None
    if cfg.train.resume is not None:
        resumed_at = check_checkpoint(module.model, cfg)
    trainer = build_trainer(cfg)
    chosen = module.model.describe(trainer.strategy.root_device.type)
    if cfg.train.compile:
        check_compiler(trainer.strategy.root_device)
    if trainer.is_global_zero:
        for line in opening_lines(cfg, data, module, trainer, chosen):
            say(line)
        if cfg.train.resume:
            say(resume_line(cfg, resumed_at))
    resuming = cfg.train.resume is not None
    if not resuming:
        trainer.validate(module, data, verbose=False)
    trainer.fit(module, data, ckpt_path=cfg.train.resume, weights_only=True)
    validated = module.val_history[-1]["step"] if module.val_history else None
    if validated != trainer.global_step:
        trainer.validate(module, data, verbose=False)
    device = trainer.strategy.root_device
    peak = peak_memory_gb(device)
    cost = {}
    if cfg.train.dense_cost and trainer.is_global_zero:
        say("cost    measuring one layer with dense attention for comparison ...")
        cost = measure_attention(module, cfg, plugins, device)
    trainer.strategy.barrier()
    result = collect_result(cfg, module, data, trainer, peak, cost, time.perf_counter() - began)
    for logger in trainer.loggers:
        logger.log_metrics(
            {f"final/{k}": v for k, v in result["final"].items()}, trainer.global_step
        )
        logger.finalize("success")
    if trainer.is_global_zero:
        columns = shutil.get_terminal_size((WIDTH, 24)).columns
        say("\n" + render_summary(result["summary"], columns))
    return result


def build_trainer(cfg: DictConfig) -> L.Trainer:
    """The Lightning Trainer of this worker; several devices train with DDP."""
    t, n = cfg.trainer, cfg.train
    strategy = t.strategy
    if strategy == "auto" and (t.devices > 1 or t.num_nodes > 1):
        strategy = "ddp"
    checkpoints = LastCheckpoint(Path(cfg.run_dir) / "checkpoints", n.checkpoint_every or n.steps)
    callbacks: list[L.Callback] = [checkpoints, *build_callbacks(cfg)]
    bar = t.progress_bar
    if bar:
        callbacks.append(progress_callback(n.steps))
    return L.Trainer(
        accelerator=t.accelerator,
        devices=t.devices,
        num_nodes=t.num_nodes,
        strategy=strategy,
        precision=t.precision,
        max_steps=n.steps,
        accumulate_grad_batches=n.accumulate,
        val_check_interval=n.val_every * n.accumulate or None,
        check_val_every_n_epoch=None if n.val_every else 1,
        limit_val_batches=1.0,
        log_every_n_steps=n.log_every,
        num_sanity_val_steps=0,
        # Metrics that the first validation resets would be inference tensors, which the
        # validations during training may not change.
        inference_mode=False,
        logger=build_loggers(cfg),
        callbacks=callbacks,
        enable_progress_bar=bool(bar),
        enable_model_summary=False,
        deterministic=n.deterministic or None,
    )


def opening_lines(
    cfg: DictConfig,
    data: TextDataModule,
    module: LanguageModel,
    trainer: L.Trainer,
    attention: list[str],
) -> list[str]:
    """What a reader wants to know before the first step."""
    device = trainer.strategy.root_device
    parameters = sum(p.numel() for p in module.model.parameters())
    described = data.describe()
    lines = [
        f"model   {cfg.model.name}: {parameters:,} parameters, {cfg.model.n_layers} layers, "
        f"context {cfg.context:,}",
        *(f"        {line}" for line in attention),
        f"slots   {slots_line(cfg)}",
        f"data    {described['source']}: {described['documents']:,} documents, "
        f"{described['tokens']:,} tokens, tokenizer {described['tokenizer']}",
        f"device  {trainer.world_size} x {device_name(device)}, precision {cfg.trainer.precision}",
    ]
    return lines


def resume_line(cfg: DictConfig, step: int | None) -> str:
    """Where a resumed run goes on; step: None where it is unknown."""
    if step is None:
        return f"resume  {cfg.train.resume}"
    rest = "" if step < cfg.train.steps else ": nothing left to train, type a larger train.steps"
    return f"resume  {cfg.train.resume}, at step {step} of {cfg.train.steps}{rest}"


def quiet_lightning() -> None:
    """Keep Lightning's tips and advice for interactive use out of the log."""
    import logging
    import warnings

    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.pytorch.accelerators.cuda",
        "mlflow.system_metrics.system_metrics_monitor",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (".*does not have many workers.*", ".*Checkpoint directory.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", message=text)
