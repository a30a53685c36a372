"""Probes of gradients: they arrive, and they are those of the function that was computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gsa_platform import registry
from gsa_platform.errors import UserError
from gsa_platform.model.transformer import Transformer
from gsa_platform.testing.case import Case, layers, losses
from gsa_platform.testing.check import SkipTest, probe
from gsa_platform.testing.compare import expect_close

ONE_LAYER = "model.n_layers=1"
INDEXING = ("indexer", "sparsity", "objective")
# A small step stays between two borders of a hard choice; a large one survives a component that
# computes in float32 inside.
TRIES = [(seed, eps) for eps in (1e-7, 1e-5, 1e-3) for seed in range(2)]
TRIES_FLOAT32 = [(seed, 1e-2) for seed in range(6)]


def loss_of(case: Case, model: Transformer, text: Tensor, own: bool = True) -> Tensor:
    """A scalar of the hidden states, plus (own) the losses of the components."""
    torch.manual_seed(0)
    out = model(text)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(out.hidden_BTD.shape[-1], generator=generator).to(out.hidden_BTD)
    loss = (out.hidden_BTD @ weight).sin().mean()
    return torch.stack([loss, *(losses(out.reports) if own else [])]).sum()


def teaching_objectives(case: Case) -> dict[str, Transformer]:
    """A one-layer model for every objective that goes with the case (itself, for an objective)."""
    if case.slot == "objective":
        return {case.name: case.model(ONE_LAYER)}
    found, out = registry.get(), {}
    for name in found.names("objective"):
        if not found.component("objective", name).target:
            continue
        try:
            out[name] = case.model(ONE_LAYER, f"objective={name}")
        except UserError:  # refused with a reason: `plugins matrix` lists it
            continue
    return out


def indexer_parameters(model: Transformer) -> list[tuple[str, nn.Parameter]]:
    return [(f"indexer.{n}", p) for n, p in layers(model)[0].indexer.named_parameters()]


def attention_call(
    case: Case, model: Transformer, text: Tensor, docs: Tensor | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the host hands the first layer's attention, detached, in a run of the model."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))

    handle = layers(model)[0].attention.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        case.run(model, text, docs)
    handle.remove()
    args, kwargs = seen[0]
    return tuple(a.detach() if isinstance(a, Tensor) else a for a in args), kwargs


@probe("backward")
def gradients_reach_every_projection(case: Case) -> None:
    """One backward: the q, k, v and o projections, and the component's own matrices, must get a
    gradient that is finite and not zero."""
    model = case.model(ONE_LAYER)
    layer = layers(model)[0]
    loss_of(case, model, case.text()).backward()
    names = [f"{p}_proj.weight" for p in "qkvo"]
    if case.slot in ("attention", "gate", "sparsity"):
        own = case.part(model).named_parameters()
        names += [f"{case.slot}.{n}" for n, p in own if p.ndim > 1 and p.requires_grad]
    for name in names:
        grad = layer.get_parameter(name).grad
        if grad is None or not bool((grad != 0).any()):
            raise AssertionError(f"after backward {name} has no gradient: it is cut off")
        if not bool(torch.isfinite(grad).all()):
            raise AssertionError(f"after backward the gradient of {name} is not finite")


@probe("backward")
def gradients_are_right(case: Case) -> None:
    """Compares outputs and gradients with the declared reference; without one, compares
    directional derivatives with central differences (float64 where it computes in float64)."""
    reference = case.entry.component.trial.reference
    if reference is not None:
        against_reference(case, [f"{case.slot}.{k}={v}" for k, v in reference.items()])
    elif case.slot in ("indexer", "objective"):
        models = teaching_objectives(case)
        if any(layers(model)[0].indexer.straight_through for model in models.values()):
            raise SkipTest("the indexer rounds: its gradients are of no difference")
        if not any(indexer_parameters(model) for model in models.values()):
            raise SkipTest("the indexer has no parameters")
        text = case.text()
        for name, model in models.items():
            what = f"the indexer's gradient under objective={name}"
            learn = [p for _, p in indexer_parameters(model)]
            against_differences(case, partial(loss_of, case, model, text), learn, what)
    elif case.slot == "attention" and case.mode:
        over_a_selection(case)
    else:
        model = case.model(ONE_LAYER)
        # A hard choice has no derivative: what only chooses is left out.
        learn = [
            p for n, p in model.named_parameters() if not any(f".{s}." in n for s in INDEXING)
        ]
        text = case.text()
        what = "the gradient of the outputs"
        # Components' own losses read detached inputs, so their value moves with more than it says.
        against_differences(case, lambda: loss_of(case, model, text, own=False), learn, what)
        own = list(case.part(model).parameters()) if case.slot == "sparsity" else []
        if own:
            what = "the gradient of its own loss"
            against_differences(case, lambda: loss_of(case, model, text), own, what)


def against_reference(case: Case, settings: list[str]) -> None:
    """Same weights, component and reference: same outputs, same gradients."""
    own = case.model(ONE_LAYER)
    other = case.model(ONE_LAYER, *settings)
    other.load_state_dict(own.state_dict())
    text = case.text()
    what = f"against {' '.join(settings)}"
    verdict = "the component and its reference disagree"
    expect_close(
        case.run(own, text), case.run(other, text), case.close, f"the output {what}", verdict
    )
    for model in (own, other):
        loss_of(case, model, text).backward()
    for (name, mine), (_, theirs) in zip(own.named_parameters(), other.named_parameters()):
        if (mine.grad is None) != (theirs.grad is None):
            raise AssertionError(f"only one of component and reference gives {name} a gradient")
        if mine.grad is not None and theirs.grad is not None:
            what_now = f"the gradient of {name} {what}"
            expect_close(mine.grad[None], theirs.grad[None], case.close, what_now, verdict)


def over_a_selection(case: Case) -> None:
    """The attention alone, called as the host calls it: gradients of q, k and v."""
    model = case.model(ONE_LAYER)
    attention = layers(model)[0].attention
    (q, k, v, *rest), kwargs = attention_call(case, model, case.text())
    inputs = [nn.Parameter(x.clone()) for x in (q, k, v)]
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(3)).to(q)

    def loss() -> Tensor:
        torch.manual_seed(0)
        out: Tensor = attention(*inputs, *rest, **kwargs).out_BTHE
        return (out * weight).sum()

    against_differences(case, loss, inputs, "the gradient of q, k and v")


def against_differences(
    case: Case, loss: Callable[[], Tensor], parameters: list[nn.Parameter], what: str
) -> None:
    """The derivative along random directions; two of six must agree to 1 %, since a difference
    may step over a border between two choices."""
    parameters = [p for p in parameters if p.requires_grad]
    for p in parameters:
        p.grad = None
    loss().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
    agreed, lines = 0, []
    for seed, eps in TRIES if case.dtype == torch.float64 else TRIES_FLOAT32:
        generator = torch.Generator().manual_seed(seed)
        direction = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
        exact = sum(float((g * d).sum()) for g, d in zip(grads, direction))
        numeric = central_difference(loss, parameters, direction, eps)
        agreed += abs(exact - numeric) <= 0.01 * max(abs(exact), abs(numeric)) + 1e-4 * norm + 1e-9
        lines.append(f"{exact:.6g} for {numeric:.6g}")
        if agreed == 2:
            return
    raise AssertionError(
        f"{what} is wrong: along random directions backward gives {'; '.join(lines[:3])} by "
        "central differences"
    )


def central_difference(
    loss: Callable[[], Tensor], parameters: list[nn.Parameter], direction: list[Tensor], eps: float
) -> float:
    """(f(p + eps d) - f(p - eps d)) / 2 eps; the parameters are restored."""
    kept = [p.detach().clone() for p in parameters]
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, old, d in zip(parameters, kept, direction):
                p.copy_(old + sign * eps * d)
        ends.append(float(loss().detach()))
    with torch.no_grad():
        for p, old in zip(parameters, kept):
            p.copy_(old)
    return (ends[0] - ends[1]) / (2 * eps)
