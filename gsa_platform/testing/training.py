"""Probes of training: one optimizer step of the LightningModule lowers the loss."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import lightning as L
import torch

from gsa_platform import registry
from gsa_platform.check import token_flops
from gsa_platform.errors import UserError
from gsa_platform.module import LanguageModel
from gsa_platform.testing.case import Case
from gsa_platform.testing.check import probe
from gsa_platform.testing.compare import expect_finite

STEP = ("optim.lr=2e-3", "optim.weight_decay=0", "train.steps=1", "optim.clip=1")


@probe("backward")
def one_step_lowers_the_loss(case: Case) -> None:
    """Lets Lightning take one optimizer step on one batch in float32: the loss of the same batch
    must fall, and the components' running values must stay finite."""
    cfg = case.config(*STEP)
    torch.manual_seed(0)
    module = LanguageModel(cfg, case.vocabulary, registry.get())
    text = case.text().cpu()
    batch = {
        "tokens_BT": text,
        "targets_BT": text.roll(-1, 1),
        "doc_start_BT": torch.zeros_like(text),
    }
    before = total(module, batch)
    fit(module, batch, case.device)
    after = total(module.to("cpu") if case.device == "cpu" else module, batch)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            expect_finite(value, f"after one optimizer step {name}")
    if not after < before:
        raise AssertionError(
            f"one AdamW step of lr 2e-3 took the loss of its own batch from {before:.6f} to "
            f"{after:.6f}: the gradient does not point downhill"
        )


@probe()
def its_cost_can_be_told(case: Case) -> None:
    """Asks for the FLOPs per token, as `check` and the closing summary do: positive and finite."""
    cost = token_flops(case.config(), case.vocabulary, case.build())
    if not 0 < cost.training < float("inf"):
        raise AssertionError(f"the cost of a token is {cost.training} FLOPs: {cost}")


def total(module: LanguageModel, batch: dict[str, torch.Tensor]) -> float:
    """Mean NLL plus the index losses of a batch, as training_step adds them."""
    device = module.model.embedding.weight.device
    placed = {k: v.to(device) for k, v in batch.items()}
    module.train()
    torch.manual_seed(0)
    docs = None if module.cfg.data.cross_document else placed["doc_start_BT"]
    out = module.model(placed["tokens_BT"], docs)
    logits = out.hidden_BTD @ module.model.head_weight_VD.T
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), placed["targets_BT"].flatten()
    )
    for kind in ("index_loss", "budget_loss"):
        found = [getattr(r, kind, None) for r in out.reports]
        if parts := [value for value in found if value is not None]:
            loss = loss + torch.stack(parts).mean()
    return float(loss.detach())


class Once:
    """A loader of one batch."""

    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter([self.batch])


def fit(module: LanguageModel, batch: dict[str, torch.Tensor], device: str) -> None:
    """One optimizer step with a bare Trainer that writes nothing."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = L.Trainer(
                accelerator=device,
                devices=1,
                max_steps=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, Once(batch))
    except UserError as error:
        raise AssertionError(f"training stops with: {error}") from error
    finally:
        logger.setLevel(level)
