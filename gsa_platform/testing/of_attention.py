"""Probes of attentions alone: what they read, what they compute, what they say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gsa_platform import registry
from gsa_platform.testing.capabilities import expect_refusal
from gsa_platform.testing.case import Case, layers
from gsa_platform.testing.check import SkipTest, probe
from gsa_platform.testing.compare import expect_close, expect_finite, expect_identical
from gsa_platform.testing.gradients import ONE_LAYER, attention_call, loss_of
from gsa_platform.testing.isolation import documents

OBSERVATIONS = {"position", "first_sparse", "first_dense", "covered"}
OBSERVATIONS |= {"possible", "got", "best", "hits", "wanted"}


@probe()
def is_softmax_over_the_selection(case: Case) -> None:
    """Compares what the host gets from it with a masked softmax over the selection's dense mask,
    with one document and with two."""
    model, text = case.model(ONE_LAYER), case.text()
    for docs in (None, documents(text, [37, 60]) if case.can.varlen else None):
        args, kwargs = attention_call(case, model, text, docs)
        torch.manual_seed(0)
        got = layers(model)[0].attention(*args, **kwargs).out_BTHE
        q, k, v, selection, *_ = args
        want = masked_softmax(q, k, v, selection.to_dense_mask())
        kind = "" if docs is None else " with documents that begin at 37 and 60"
        what = f"the output{kind}, against a softmax over the selected keys,"
        expect_close(got, want, case.close, what, "it attends to other keys, or in another way")


def masked_softmax(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, mask_BHTS: Tensor) -> Tensor:
    """softmax(q k / sqrt(E)) v where the mask (of 1, K or H heads) is True."""
    group = q_BTHE.shape[2] // k_BSKE.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k_BSKE, v_BSKE))
    mask = mask_BHTS.repeat_interleave(q_BTHE.shape[2] // mask_BHTS.shape[1], 1)
    logits = torch.einsum("bthe,bshe->bhts", q_BTHE, k) * q_BTHE.shape[-1] ** -0.5
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshe->bthe", weights, v)


@probe()
def unselected_keys_are_not_read(case: Case) -> None:
    """Replaces every key and value that the last query's head group did not select: its output
    must stay, bit by bit."""
    model = case.model(ONE_LAYER)
    args, kwargs = attention_call(case, model, case.text())
    q, k, v, selection, *rest = args
    attention: Any = layers(model)[0].attention
    torch.manual_seed(0)
    before = attention(*args, **kwargs).out_BTHE
    read_BS = selection.to_dense_mask()[:, :, -1].any(1)
    unread = ~read_BS[:, :, None, None]
    torch.manual_seed(0)
    after = attention(q, k + 3.0 * unread, v - 5.0 * unread, selection, *rest, **kwargs).out_BTHE
    expect_identical(
        after[:, -1:],
        before[:, -1:],
        f"changing the {int(unread[0].sum())} keys that the last query did not select",
        "it reads keys outside the selection",
        case.length - 1,
    )


@probe("backward")
def declared_mass_and_bias_are_given(case: Case) -> None:
    """Trains a step beside every objective that needs the attention's mass or a bias on its
    logits: where it declares them the loss is finite and a bias moves the output, where it does
    not the run is refused."""
    found, text = registry.get(), case.text()
    plain = case.run(case.model(ONE_LAYER), text)
    for name in found.names("objective"):
        needs = list(getattr(found.component("objective", name).capabilities, "requires", {}))
        lacking = [need for need in needs if not getattr(case.can, need, True)]
        if not needs or lacking:
            if lacking:
                expect_refusal(case, (f"objective={name}",), f"{lacking[0]}=False and {name}")
            continue
        model = case.model(ONE_LAYER, f"objective={name}")
        try:
            loss = loss_of(case, model, text)
        except Exception as error:
            raise AssertionError(
                f"it declares {' and '.join(needs)}, but a step with objective={name} raises "
                f"{type(error).__name__}: {error}"
            ) from error
        expect_finite(loss, f"the loss with objective={name}")
        if "bias" in needs and torch.equal(case.run(model, text), plain):
            raise AssertionError(
                f"it declares bias, but objective={name}, which adds one to the logits of "
                "selected keys, moves no output: the bias is ignored"
            )


@probe("fused_gate")
def a_fused_gate_multiplies_the_output(case: Case) -> None:
    """Calls it as the host does, with a gate of every sign per channel and per head: outputs and
    gradients must be those of its ungated output times the gate, over a selection and (in a
    warm-up) over every key."""
    model = case.model(ONE_LAYER)
    attention = layers(model)[0].attention
    (q, k, v, selection, *rest), kwargs = attention_call(case, model, case.text())
    kwargs.pop("gate", None)
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(q.shape, generator=generator).to(q)

    def call(selection: Any, gate: Tensor, fused: bool) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, gate)]
        torch.manual_seed(0)
        more = kwargs | ({"gate": leaves[3]} if fused else {})
        out = attention(*leaves[:3], selection, *rest, **more).out_BTHE
        out = out if fused else out * leaves[3]
        learn = leaves if case.can.backward else []
        return [out.detach(), *(torch.autograd.grad((out * weight).sum(), learn) if learn else ())]

    for channels, kind in ((q.shape[3], "channel"), (1, "head")):
        gate = torch.randn(*q.shape[:3], channels, generator=generator).to(q)
        for chosen in (selection, None) if selection is not None else (None,):
            try:
                got = call(chosen, gate, fused=True)
            except Exception as error:
                raise AssertionError(
                    f"it declares fused_gate, but with a gate per {kind} it raises "
                    f"{type(error).__name__}: {error}"
                ) from error
            want = call(chosen, gate, fused=False)
            names = ("the output", *(f"the gradient of {x}" for x in ("q", "k", "v", "the gate")))
            for name, a, b in zip(names, got, want):
                what = f"with a gate per {kind}, {name}, against multiplying afterwards,"
                expect_close(a, b, case.close, what, "the fused gate is not a multiplication")


@probe()
def describes_itself(case: Case) -> None:
    """Asks for the line of the log on every declared device: text, one line."""
    attention = case.part(case.build())
    for device in case.devices:
        line = attention.describe(device)
        if not isinstance(line, str) or "\n" in line:
            raise AssertionError(f"describe({device!r}) returned {line!r}, not one line of text")


@probe()
def observations_are_as_documented(case: Case) -> None:
    """Asks for the diagnostics of one forward: nothing, or one-dimensional tensors by the names
    of the contract."""
    model = case.model()
    with torch.no_grad():
        reports = model(case.text(), probe=True).reports
    for report in reports:
        if extra := set(report.probe) - OBSERVATIONS:
            raise AssertionError(
                f"probe() returned {sorted(extra)}; known: {sorted(OBSERVATIONS)}"
            )
        for name, value in report.probe.items():
            if value.ndim != 1 or value.requires_grad:
                raise AssertionError(f"probe()[{name!r}] must be detached and one-dimensional")


@probe()
def its_choices_matter(case: Case) -> None:
    """Counts the keys that queries attend: some must be left out, or the other checks would
    compare dense attention with itself."""
    if not case.mode:
        dense = case.entry.component.trial.dense
        if dense == {}:
            raise SkipTest("it attends to every key, as it declares")
        if dense is None:
            raise SkipTest("it takes no selection and declares no settings to prune less")
        more = [f"{case.slot}.{key}={value}" for key, value in dense.items()]
        text = case.text()
        if not torch.equal(case.run(case.model(), text), case.run(case.model(*more), text)):
            return
        raise AssertionError(f"{case.settings or 'its small settings'} prune nothing: {_ADVICE}")
    kept = max(float(r.keys["max"]) for r in case.model()(case.text()).reports)
    if kept >= case.length:
        raise AssertionError(f"a query attends all of {case.length} keys: {_ADVICE}")


_ADVICE = (
    "give smaller settings to the checks, or in the record: Component(trial=Trial(small=...))"
)
