"""Probes of indexers and objectives: gradients arrive, budgets hold, inputs are detached."""

from __future__ import annotations

import torch

from gsa_platform.testing.case import Case, layers
from gsa_platform.testing.check import SkipTest, probe
from gsa_platform.testing.compare import expect_finite
from gsa_platform.testing.gradients import (
    indexer_parameters,
    loss_of,
    teaching_objectives,
)


@probe("backward")
def objectives_teach_the_indexer(case: Case) -> None:
    """One backward under every objective that goes with it: each matrix of the indexer must get a
    gradient that is finite and not zero."""
    taught = False
    for name, model in teaching_objectives(case).items():
        parameters = indexer_parameters(model)
        loss_of(case, model, case.text()).backward()
        for weight, parameter in parameters:
            if parameter.ndim < 2 or not parameter.requires_grad:
                continue
            taught = True
            if parameter.grad is None or not bool((parameter.grad != 0).any()):
                raise AssertionError(
                    f"under objective={name} {weight} gets no gradient: the indexer never learns"
                )
            expect_finite(parameter.grad, f"under objective={name} the gradient of {weight}")
    if not taught:
        raise SkipTest("the indexer has no matrices to learn")


@probe()
def selections_keep_to_the_budget(case: Case) -> None:
    """Counts the keys every query attends: at least one, at most max_keys and what the granularity
    adds (the window reaches to the start of a block and, in a tile, over its first queries)."""
    model, text = case.model(), case.text()
    with torch.no_grad():
        reports = model(text, probe=True).reports
    for layer, report in zip(layers(model), reports, strict=True):
        spec = layer.attention.selection_spec(layer.sparsity)
        spare = getattr(spec, "key_block", 1) + getattr(spec, "query_tile", 1) - 2
        most, keys = layer.sparsity.max_keys + spare, report.keys_BHT
        if keys is None or int(keys.min()) < 1:
            raise AssertionError("a query attends no key at all, not even itself")
        if int(keys.max()) > most:
            at = int((keys > most).flatten(0, 1).any(0).nonzero()[0])
            raise AssertionError(
                f"query {at} attends {int(keys.max())} keys, max_keys={layer.sparsity.max_keys} "
                f"(and {spare} by the granularity): more than the budget"
            )


@probe("backward")
def index_losses_are_scalars_of_training_only(case: Case) -> None:
    """Runs while training and while evaluating: a finite scalar with a gradient (or none) in the
    first, nothing in the second."""
    model, text = case.model(), case.text()
    for report in case_reports(model, text):
        loss = report.index_loss
        if loss is not None and (loss.ndim or not loss.requires_grad):
            raise AssertionError(
                f"loss() returned shape {tuple(loss.shape)}, without a gradient"
                if not loss.requires_grad
                else "loss() returned no scalar"
            )
        if loss is not None:
            expect_finite(loss, "the index loss")
    model.eval()
    if any(report.index_loss is not None for report in case_reports(model, text)):
        raise AssertionError("the objective computes a loss while evaluating")


def case_reports(model, text):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    return model(text).reports


@probe("backward")
def detached_objectives_move_only_the_indexer(case: Case) -> None:
    """Where the objective says detach_indexer, its loss alone must not reach the rest of the
    model."""
    model = case.model()
    losses = [r.index_loss for r in case_reports(model, case.text()) if r.index_loss is not None]
    if not losses or not case.part(model).detach_indexer:
        raise SkipTest("it has no loss of its own, or does not detach the indexer")
    sum(losses).backward()
    parts = (".indexer.", ".objective.")
    for name, parameter in model.named_parameters():
        inside = any(part in name for part in parts)
        if not inside and parameter.grad is not None and bool((parameter.grad != 0).any()):
            raise AssertionError(
                f"detach_indexer is set, and yet the index loss has a gradient for {name}"
            )
