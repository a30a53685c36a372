"""Probes of sparsity controllers: whole budgets in bounds, each from its own row alone."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from gsa_platform.contracts import Sequence
from gsa_platform.testing.case import Case, layers
from gsa_platform.testing.check import SkipTest, probe
from gsa_platform.testing.compare import expect_close


def budget_of(case: Case, model: Any, step: int = 0) -> Any:
    """The int or the rule of the first layer. A controller may take the Sequence, whose step it
    may depend on, and the granularity."""
    layer = layers(model)[0]
    spec = layer.attention.selection_spec(layer.sparsity)
    takes = len(inspect.signature(layer.sparsity.budget).parameters)
    return layer.sparsity.budget(*(Sequence(step=step), spec)[:takes])


def statistics_of(case: Case, model: Any) -> list[dict[str, Tensor]]:
    """The score statistics of each layer's selections in one run, [B, H, Q] each."""
    seen: list[dict[str, Tensor]] = []
    for layer in layers(model):
        select = layer.indexer.select

        def keep(*args: Any, _select: Any = select, **kwargs: Any) -> Any:
            choice = _select(*args, **kwargs)
            seen.append(choice.statistics)
            return choice

        layer.indexer.select = keep
    with torch.no_grad():
        case.run(model, case.text())
    for layer in layers(model):
        del layer.indexer.select
    return seen


@probe()
def window_sinks_and_bound_are_whole_numbers(case: Case) -> None:
    """Reads window (at least 1), sinks (at least 0) and max_keys (no less than both)."""
    part = case.part(case.build())
    for name, low in (("window", 1), ("sinks", 0), ("max_keys", 1)):
        value = getattr(part, name, None)
        if type(value) is not int or value < low:
            raise AssertionError(f"{name} is {value!r}; it must be an int of at least {low}")
    if part.max_keys < part.window + part.sinks:
        raise AssertionError(
            f"max_keys={part.max_keys} is below window {part.window} + sinks {part.sinks}"
        )


@probe()
def budgets_are_whole_and_in_bounds(case: Case) -> None:
    """Asks for the budget early and late in training, over the statistics of a running model: an
    int or whole numbers, one per row, at least 1 and at most max_keys."""
    model = case.model()
    part, rows = case.part(model), statistics_of(case, model)
    for step in (0, 1, 10**6):
        budget = budget_of(case, model, step)
        if isinstance(budget, bool) or not (isinstance(budget, int) or callable(budget)):
            raise AssertionError(f"budget() returned {budget!r}, neither an int nor a rule")
        values = [budget] if isinstance(budget, int) else [_whole(budget, row) for row in rows]
        for value in values:
            low, high = (int(getattr(torch.as_tensor(value), f)()) for f in ("min", "max"))
            if low < 1 or high > part.max_keys:
                raise AssertionError(
                    f"budgets run from {low} to {high}, outside 1 .. max_keys={part.max_keys} "
                    f"(at step {step}, over {case.length} tokens)"
                )


def _whole(rule: Any, row: dict[str, Tensor]) -> Tensor:
    out = rule(row)
    shape = next(iter(row.values())).shape[:3] if row else None
    if out.dtype.is_floating_point or (shape is not None and out.shape != shape):
        raise AssertionError(
            f"the rule returned {out.dtype} of shape {tuple(out.shape)}; statistics have shape "
            f"{tuple(shape or ())} and budgets are whole numbers"
        )
    return out


@probe()
def budgets_come_from_their_own_row(case: Case) -> None:
    """Changes the statistics of one sequence, and of the later queries: the budgets of the others
    must stay."""
    model = case.model()
    rows = statistics_of(case, model)
    rule, row = budget_of(case, model), rows[0]
    if not callable(rule) or not row:
        raise SkipTest("its budget does not depend on the scores")
    before = rule(row)
    half = before.shape[2] // 2
    for index, who in (
        ((1,), "sequence 1"),
        ((slice(None), slice(None), slice(half, None)), f"queries {half}.."),
    ):
        other = {n: s.clone() for n, s in row.items()}
        keep = torch.ones_like(before, dtype=torch.bool)
        keep[index] = False
        for value in other.values():
            value[index] = (value[index] * 3 + 2).to(value.dtype)
        after = rule(other)
        if not torch.equal(after[keep], before[keep]):
            moved = int((after[keep] - before[keep]).abs().max())
            raise AssertionError(
                f"changing the statistics of {who} moved other budgets by {moved} keys: a budget "
                "may only depend on its own row (a batch mean leaks other samples and the future)"
            )


@probe()
def observing_is_remembered(case: Case) -> None:
    """Shows it the statistics of a step and loads its state into a fresh model: the same
    outputs."""
    model, fresh = case.model(), case.model(seed=3)
    for seed in (11, 12):
        reports = model(case.text(seed=seed)).reports
        model.observe([report.statistics for report in reports])
    fresh.load_state_dict(model.state_dict())
    verdict = "a running value is no registered buffer"
    got, want = case.run(fresh, case.text()), case.run(model, case.text())
    expect_close(got, want, case.close, "the output after loading its state elsewhere", verdict)
