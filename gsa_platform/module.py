"""The LightningModule: losses, optimizer, and what is logged at every step."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor

from gsa_platform.metrics.nll import TokenNLL
from gsa_platform.metrics.observer import AttentionObserver
from gsa_platform.model.cross_entropy import chunked_cross_entropy
from gsa_platform.model.transformer import ModelOutput, Transformer
from gsa_platform.optim import build_optimizer, build_schedule
from gsa_platform.registry import Registry

CONFIG_KEY = "gsa_platform"  # where a checkpoint keeps the plain configuration and vocabulary


class LanguageModel(L.LightningModule):
    """Next-token prediction with the indexer's objective beside it."""

    def __init__(self, cfg: Any, vocab_size: int, registry: Registry) -> None:
        super().__init__()
        self.cfg, self.vocab_size = cfg, vocab_size
        self.model = Transformer(cfg, vocab_size, registry)
        self.freeze_untrained()
        if cfg.train.compile:
            self.model.compile_blocks()
        self.val_nll = TokenNLL()
        self.observer = AttentionObserver(cfg.model.n_layers, cfg.context)
        self.val_history: list[dict[str, float]] = []
        self.loss_history: list[float] = []
        self.step_seconds: list[float] = []
        self._statistics: list[list[dict[str, Tensor]]] = []
        self._figures: list[dict[str, Tensor]] = []
        self._last_step_end: float | None = None
        self.first_token_layers: list[float] | None = None

    def freeze_untrained(self) -> None:
        """An indexer without an objective gets no gradient; say so to the optimizer and to DDP."""
        for block in self.model.blocks:
            layer = block.attention
            if layer.indexer is not None and layer.objective is None:
                layer.indexer.requires_grad_(False)

    def losses(
        self, batch: dict[str, Tensor], probe: bool = False
    ) -> tuple[Tensor, Tensor, ModelOutput]:
        """(summed NLL, scored tokens, model output) of a batch."""
        docs = None if self.cfg.data.cross_document else batch["doc_start_BT"]
        out = self.model(batch["tokens_BT"], docs, int(self.global_step), None, probe)
        nll, n = chunked_cross_entropy(
            out.hidden_BTD.flatten(0, 1),
            self.model.head_weight_VD,
            batch["targets_BT"].flatten(),
            self.cfg.train.ce_chunk,
        )
        return nll, n, out

    def training_step(self, batch: dict[str, Tensor], _index: int) -> Tensor:
        nll, n, out = self.losses(batch)
        world = self.trainer.world_size
        total_n = n
        if world > 1:
            # The mean over every rank's tokens, as one rank with the whole batch would take it.
            total_n = n.clone()
            dist.all_reduce(total_n)
        loss = nll * world / total_n.clamp_min(1)
        index_losses = [r.index_loss for r in out.reports if r.index_loss is not None]
        total = loss
        if index_losses:
            total = total + torch.stack(index_losses).mean()
        budget_losses = [r.budget_loss for r in out.reports if r.budget_loss is not None]
        if budget_losses:
            total = total + torch.stack(budget_losses).mean()
        if world > 1:
            # Queries without candidates leave these parameters unused, which DDP refuses.
            for block in self.model.blocks:
                for part in (block.attention.indexer, block.attention.sparsity):
                    for p in [] if part is None else part.parameters():
                        if p.requires_grad:
                            total = total + 0.0 * p.flatten()[0]
        self._statistics.append([r.statistics for r in out.reports])
        self._figures.append(_figures(loss.detach(), out))
        return total

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        """After an optimizer step: running values of the controllers, and throughput."""
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        self.model.observe(_mean_statistics(self._statistics))
        self._statistics = []
        now = time.perf_counter()
        if self._last_step_end is not None:
            seconds = now - self._last_step_end
            self.step_seconds.append(seconds)
            tokens = batch["tokens_BT"].numel() * self.trainer.accumulate_grad_batches
            rate = tokens * self.trainer.world_size / seconds
            self.log("perf/tokens_per_s", rate, prog_bar=True)
        self._last_step_end = time.perf_counter()

    def on_train_start(self) -> None:
        self._last_step_end = None

    def configure_gradient_clipping(self, optimizer: Any, *_args: Any, **_kwargs: Any) -> None:
        """Runs once per optimizer step, before it: clip, and log the step's figures."""
        clip = self.cfg.optim.clip
        figures = _over_step(self._figures, self.trainer.world_size)
        self._figures = []
        self.loss_history.append(float(figures["train/loss"]))
        for name, value in figures.items():
            self.log(name, value, prog_bar=name == "train/loss")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), clip if clip else float("inf"))
        self.log("train/grad_norm", norm)
        self.log("train/lr", optimizer.param_groups[0]["lr"])

    def validation_step(self, batch: dict[str, Tensor], _index: int) -> None:
        # Compiling the model a second time, for validation, costs more than a few batches save.
        with torch.compiler.set_stance("force_eager"):
            nll, n, out = self.losses(batch, probe=True)
        self.val_nll.update(nll, n)
        position = torch.arange(batch["tokens_BT"].shape[1], device=nll.device)
        start = 0 if self.cfg.data.cross_document else batch["doc_start_BT"]
        self.observer.update(out.reports, (position - start).expand_as(batch["tokens_BT"]))

    def on_validation_epoch_end(self) -> None:
        if not int(self.val_nll.n_tokens):
            return
        values = {"loss": float(self.val_nll.compute())}
        values["perplexity"] = float(self.val_nll.perplexity())
        values |= self.observer.compute()
        step = float(self.global_step)
        # "step" is where Lightning logs; its own count is one short inside fit.
        self.log_dict({"step": step} | {f"val/{k}": v for k, v in values.items()})
        self.val_history.append({"step": step, **values})
        self.first_token_layers = self.observer.layers_first_token()
        self.val_nll.reset()
        self.observer.reset()
        self._last_step_end = None  # validation is no part of a step's time

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self, self.cfg)
        schedule = build_schedule(optimizer, self.cfg)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Plain containers only: checkpoints must load with weights_only=True.
        plain = OmegaConf.to_container(self.cfg, resolve=True)
        checkpoint[CONFIG_KEY] = {"config": plain, "vocab_size": self.vocab_size}


GATE_FIGURES = ("value_mean", "output_mean", "value_low", "output_low")
KEYS_MAX = "attention/keys_max"


def _figures(loss: Tensor, out: ModelOutput) -> dict[str, Tensor]:
    """What is logged of one micro-batch."""
    figures = {"train/loss": loss}
    for name in ("index_loss", "budget_loss"):
        losses = [getattr(r, name) for r in out.reports if getattr(r, name) is not None]
        if losses:
            figures[f"train/{name}"] = torch.stack([x.detach() for x in losses]).mean()
    keys = [r.keys for r in out.reports if r.keys]
    if keys:
        figures["attention/keys_mean"] = torch.stack([k["mean"] for k in keys]).mean()
        figures[KEYS_MAX] = torch.stack([k["max"] for k in keys]).max()
    for gate in GATE_FIGURES:
        values = [r.gates[gate] for r in out.reports if gate in r.gates]
        if values:
            figures[f"gate/{gate}"] = torch.stack(values).mean()
    return figures


def _over_step(micro: list[dict[str, Tensor]], world: int) -> dict[str, Tensor]:
    """Means over the micro-batches of a step and the ranks; of keys_max the maximum."""
    means = {n: torch.stack([m[n] for m in micro]).mean() for n in micro[0] if n != KEYS_MAX}
    if world > 1:
        summed = torch.stack([value.float() for value in means.values()])
        dist.all_reduce(summed)
        means = dict(zip(means, (summed / world).unbind()))
    if KEYS_MAX in micro[0]:
        means[KEYS_MAX] = torch.stack([m[KEYS_MAX] for m in micro]).max()
        if world > 1:
            dist.all_reduce(means[KEYS_MAX], dist.ReduceOp.MAX)
    return means


def _mean_statistics(micro: list[list[dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
    """Mean over the micro-batches of a step, layer by layer."""
    layers = []
    for reports in zip(*micro, strict=True):
        names = reports[0].keys()
        layers.append({n: torch.stack([r[n] for r in reports]).mean(0) for n in names})
    return layers
