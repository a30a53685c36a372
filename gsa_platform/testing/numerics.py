"""Probes of numbers: shapes, dtypes, head groups, memory, determinism, compilation."""

from __future__ import annotations

import copy
import dataclasses

import torch

from gsa_platform import registry
from gsa_platform.testing.case import HEADS, Case, layers, losses
from gsa_platform.testing.check import SkipTest, probe
from gsa_platform.testing.compare import difference, expect_close, expect_finite
from gsa_platform.testing.gradients import ONE_LAYER, attention_call, loss_of
from gsa_platform.testing.poison import PoisonedMemory


@probe()
def declared_dtypes_and_devices_work(case: Case) -> None:
    """Runs the model in every declared dtype on every declared device that is here: the output
    keeps shape, dtype and device, and is finite."""
    for device in case.devices:
        for name in case.can.dtypes:
            dtype = getattr(torch, name)
            model = case.build().to(device, dtype)
            text = case.text().to(device)
            try:
                out = case.run(model, text)
            except Exception as error:
                raise AssertionError(
                    f"it declares {name} on {device}, but a forward in {name} raises "
                    f"{type(error).__name__}: {error}"
                ) from error
            if out.dtype != dtype or out.device.type != device:
                raise AssertionError(
                    f"a model in {name} on {device} returns {out.dtype} on {out.device}"
                )
            if out.shape != (*text.shape, case.config().model.d_model):
                raise AssertionError(f"the output has shape {tuple(out.shape)}")
            expect_finite(out, f"the output in {name} on {device}")


@probe()
def every_head_grouping_runs(case: Case) -> None:
    """Runs 4 query heads on 1, 2 and 4 key-value heads, and on half of the batch's length."""
    for kv_heads in (1, 2, HEADS):
        model = case.model(ONE_LAYER, f"model.n_kv_heads={kv_heads}")
        out = case.run(model, case.text())
        expect_finite(out, f"the output with {HEADS} query and {kv_heads} key-value heads")


@probe()
def grouped_heads_are_repeated_heads(case: Case) -> None:
    """Gives the attention of a running layer its keys and values once per query head instead of
    once per group: the same output."""
    model = case.model(ONE_LAYER)
    layer = layers(model)[0]
    args, kwargs = attention_call(case, model, case.text())
    q, k, v, *rest = args
    dims = dataclasses.replace(layer.dims, n_kv_heads=HEADS)
    single = registry.get().build("attention", case.config(ONE_LAYER).attention, dims).to(q)
    try:
        single.load_state_dict(layer.attention.state_dict())
    except RuntimeError:
        raise SkipTest("its weights depend on the number of key-value heads") from None
    group = q.shape[2] // k.shape[2]
    repeated = (k.repeat_interleave(group, 2), v.repeat_interleave(group, 2))
    torch.manual_seed(0)
    grouped = layer.attention(*args, **kwargs).out_BTHE
    torch.manual_seed(0)
    expect_close(
        grouped,
        single(q, *repeated, *rest, **kwargs).out_BTHE,
        case.close,
        "the output of grouped heads, against keys and values repeated for each query head,",
        "query heads read the wrong key-value head",
    )


@probe("backward")
def unwritten_memory_is_never_read(case: Case) -> None:
    """Builds and runs the model, forward and backward, while torch.empty returns NaN: everything
    stays finite, and the output what it was."""
    plain = case.run(case.model(ONE_LAYER), case.text())
    with PoisonedMemory():
        model = case.model(ONE_LAYER)
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expect_finite(value, f"with torch.empty returning NaN, the new weights {name}")
        out = case.run(model, case.text())
        loss_of(case, model, case.text()).backward()
    expect_finite(out, "with torch.empty returning NaN, the output")
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            expect_finite(
                parameter.grad, f"with torch.empty returning NaN, the gradient of {name}"
            )
    verdict = "it reads memory that it did not write"
    expect_close(out, plain, case.close, "with torch.empty returning NaN, the output", verdict)


@probe("deterministic", "backward")
def runs_repeat_exactly(case: Case) -> None:
    """Runs forward and backward twice without seeding, under PyTorch's deterministic algorithms:
    bit-identical, since it declares deterministic=True."""
    model, text = case.model(ONE_LAYER), case.text()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            out = model(text)
            torch.stack([out.hidden_BTD.sin().mean(), *losses(out.reports)]).sum().backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            results.append({"the output": out.hidden_BTD.detach(), **grads})
    finally:
        torch.use_deterministic_algorithms(before)
    for name, value in results[0].items():
        _, amount = difference(results[1][name][None], value[None])
        if amount:
            what = name if name == "the output" else f"the gradient of {name}"
            raise AssertionError(
                f"{what} changed by {amount:.2g} from one run to the next, although it declares "
                "deterministic=True"
            )


@probe("backward")
def recomputing_changes_nothing(case: Case) -> None:
    """Runs with activation checkpointing: the same loss and gradients, bit by bit."""
    model, text = case.model(), case.text()
    results = []
    for recompute in (False, True):
        model.activation_checkpointing = recompute
        model.zero_grad(set_to_none=True)
        loss = loss_of(case, model, text)
        loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        results[-1]["loss"] = loss.detach()
    for name, value in results[0].items():
        if name not in results[1] or not torch.equal(results[1][name], value):
            raise AssertionError(
                f"with train.activation_checkpointing=true {name} has another gradient or value: "
                "recomputing a layer does not give what the first pass gave"
            )


@probe("backward")
def compiles(case: Case) -> None:
    """Compiles the block as train.compile does (torch.compile, eager backend), forward and
    backward: the same output and gradients."""
    model, text = case.model(ONE_LAYER), case.text()
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled.compile_blocks(backend="eager")
    try:
        out = case.run(compiled, text)
        out.sin().mean().backward()
    except Exception as error:
        raise AssertionError(f"torch.compile fails: {type(error).__name__}: {error}") from error
    finally:
        torch._dynamo.reset()
    plain = case.run(model, text)
    plain.sin().mean().backward()
    verdict = "compiling changes the result"
    expect_close(out, plain, case.close, "the compiled output", verdict)
    for (name, mine), (_, theirs) in zip(compiled.named_parameters(), model.named_parameters()):
        if mine.grad is not None and theirs.grad is not None:
            what = f"the compiled gradient of {name}"
            expect_close(mine.grad[None], theirs.grad[None], case.close, what, verdict)
