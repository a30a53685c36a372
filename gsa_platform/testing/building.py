"""Probes of building and copying: defaults, YAML, unknown settings, state_dict, copies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from omegaconf import OmegaConf

from gsa_platform import compose, registry
from gsa_platform.errors import UserError
from gsa_platform.model.transformer import Transformer
from gsa_platform.testing.case import Case, layers
from gsa_platform.testing.check import SkipTest, probe
from gsa_platform.testing.compare import expect_close, expect_finite, expect_identical


@probe()
def builds_from_defaults(case: Case) -> None:
    """Builds the component with no settings at all and runs one forward."""
    component = case.entry.component
    cfg = compose.load(case.overrides(case.sizes))
    cfg[case.slot] = OmegaConf.structured(component.config)
    torch.manual_seed(0)
    try:
        model = Transformer(cfg, case.vocabulary, registry.get()).to(case.device)
    except UserError as error:
        raise AssertionError(f"{case.slot}={case.name} does not build: {error}") from error
    expect_finite(case.run(model, case.text()), "with default settings, the output")


@probe()
def survives_yaml(case: Case) -> None:
    """Writes the configuration as YAML, as a run folder holds it, and builds from what is read."""
    cfg = case.config()
    again: Any = OmegaConf.create(OmegaConf.to_yaml(cfg, resolve=True))
    before, after = cfg[case.slot], again[case.slot]
    if after != OmegaConf.to_container(before):
        raise AssertionError(f"settings change on their way through YAML: {before} became {after}")
    torch.manual_seed(0)
    model = Transformer(again, case.vocabulary, registry.get()).to(case.device)
    expect_identical(
        case.run(model, case.text()),
        case.run(case.build(), case.text()),
        "building from YAML instead of the composed configuration",
        "a setting loses its value",
    )


@probe(anywhere=True)
def unknown_settings_are_refused(case: Case) -> None:
    """Composes with a setting that does not exist: a UserError that names it."""
    wrong = f"{case.slot}.no_such_setting"
    try:
        compose.load([*case.overrides(case.sizes), f"{wrong}=1"])
    except UserError as error:
        if "no_such_setting" in str(error):
            return
        raise AssertionError(f"the error for {wrong}=1 does not name it: {error}") from error
    raise AssertionError(
        f"{wrong}=1 is taken without a word: the config class must be a plain dataclass"
    )


@probe()
def state_dict_holds_everything(case: Case) -> None:
    """Loads the state of one model into another with other initial values: the same outputs."""
    one, two = case.model(), case.model(seed=7)
    two.load_state_dict(one.state_dict())
    expect_identical(
        case.run(two, case.text()),
        case.run(one, case.text()),
        "loading state_dict() into a newly built model",
        "something that matters is neither a parameter nor a buffer",
    )


@probe()
def copies_are_independent(case: Case) -> None:
    """Deep-copies the model, changes the copy, and compares the original with itself."""
    model, text = case.model(), case.text()
    before = case.run(model, text).detach()
    twin = copy.deepcopy(model)
    expect_identical(case.run(twin, text), before, "deepcopy", "the copy computes something else")
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    case.run(twin, text)
    verdict = "the copy shares state with it"
    expect_identical(case.run(model, text), before, "changing a deep copy", verdict)


@probe()
def pickles(case: Case) -> None:
    """Pickles the component, puts what comes back in its place, and compares the outputs."""
    model, text = case.model(), case.text()
    before = case.run(model, text).detach()
    try:
        for layer in layers(model):
            setattr(layer, case.slot, pickle.loads(pickle.dumps(getattr(layer, case.slot))))
    except Exception as error:
        raise AssertionError(
            "pickle fails, so it cannot be sent to another process: "
            f"{type(error).__name__}: {error}"
        ) from error
    verdict = "what comes back is not the component"
    expect_identical(case.run(model, text), before, "pickling and unpickling", verdict)


@probe()
def equals_dense_attention_when_nothing_is_pruned(case: Case) -> None:
    """Gives it a budget for every key (or the settings its record declares), and compares outputs
    and gradients with attention=dense and the same weights."""
    dense_settings = unpruned(case)
    sparse = case.model(*dense_settings)
    dense_case = Case("attention", "dense", beside=[f"context={case.length}"])
    dense = dense_case.model(
        f"model.head_dim={case.head_dim}", f"model.d_model={case.head_dim * 4}"
    )
    state = sparse.state_dict()
    dense.load_state_dict({name: state[name] for name in dense.state_dict()})
    dense.to(case.dtype)
    text = case.text()
    got, want = case.run(sparse, text), case.run(dense, text)
    what = f"with {' '.join(dense_settings) or 'its settings'}, the output against attention=dense"
    expect_close(got, want, case.close, what, "it is not softmax attention over every key")
    if not case.can.backward:
        return
    got.sin().mean().backward()
    want.sin().mean().backward()
    for name, parameter in dense.named_parameters():
        grad = dict(sparse.named_parameters())[name].grad
        if parameter.grad is not None and grad is not None:
            what = f"the gradient of {name} against attention=dense"
            expect_close(grad[None], parameter.grad[None], case.close, what, "it is another one")


def unpruned(case: Case) -> list[str]:
    """Settings under which every key is attended, or SkipTest."""
    declared = case.entry.component.trial.dense
    settings = [f"{case.slot}.{key}={value}" for key, value in (declared or {}).items()]
    if case.slot == "attention" and not case.mode:
        if declared is None:
            raise SkipTest("declares no settings under which it attends every key (Trial.dense)")
        return settings
    if case.slot == "sparsity" and declared is not None:
        return settings
    whole = 1024 * (1 + case.length // 1024)
    names = sorted(set(map(str, case.config().sparsity)) & {"k", "k_min", "k_max"})
    if not names:
        raise SkipTest("declares no settings under which nothing is pruned (Trial.dense)")
    return [*settings, *(f"sparsity.{name}={whole}" for name in names)]
