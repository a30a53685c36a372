"""Probes of causality: no output may know a later token."""

from __future__ import annotations

import torch
from torch import Tensor

from gsa_platform.testing.case import Case
from gsa_platform.testing.check import probe
from gsa_platform.testing.compare import difference, expect_close, expect_identical


def cuts(length: int) -> list[int]:
    """Positions near the start, at and beside multiples of 16, in the middle and at the end."""
    return [1, 17, length // 2 - 2, 64 if length > 64 else length // 3, length - 1]


def changed(case: Case, text: Tensor, start: int, end: int | None = None) -> Tensor:
    """The text with every token from start on (to end) replaced by another one."""
    other = text.clone()
    shift = 1 + case.text(text.shape[0], text.shape[1], seed=5) % (case.vocabulary - 1)
    other[:, start:end] = ((text + shift) % case.vocabulary)[:, start:end]
    return other


@probe()
def later_tokens_change_nothing(case: Case) -> None:
    """Replaces the tokens t.. and compares the outputs before t bit by bit, while training and
    while evaluating."""
    for training in (True, False):
        model, text = case.model().train(training), case.text()
        how = "training" if training else "evaluation"
        with torch.set_grad_enabled(training):
            before = case.run(model, text)
            for t in cuts(case.length):
                after = case.run(model, changed(case, text, t))
                expect_identical(
                    after[:, :t],
                    before[:, :t],
                    f"changing tokens {t}.. of {case.length} ({how})",
                    "it reads the future",
                )
                if difference(after[:, t:], before[:, t:])[0] < 0:
                    raise AssertionError(
                        f"changing tokens {t}.. moved no output at all ({how}): the output does "
                        "not depend on the text"
                    )


@probe("backward")
def no_gradient_from_later_tokens(case: Case) -> None:
    """Takes the gradient of the outputs before t with respect to the token embeddings: it must be
    exactly zero from t on."""
    model = case.model()
    held: list[Tensor] = []

    def keep(_module: object, _args: object, output: Tensor) -> Tensor:
        held.append(output.detach().requires_grad_())
        return held[-1]

    handle = model.embedding.register_forward_hook(keep)
    out = case.run(model, case.text())
    handle.remove()
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(out.shape[-1], generator=generator).to(out)
    for t in cuts(case.length):
        loss = (out[:, :t] @ weight).sin().sum()
        (grad,) = torch.autograd.grad(loss, held[-1], retain_graph=True)
        future = grad[:, t:].abs().flatten(2).amax((0, 2)) if t < case.length else grad[:0]
        if future.numel() and float(future.max()) != 0:
            position = t + int(future.argmax())
            raise AssertionError(
                f"the outputs before position {t} have a gradient of {float(future.max()):.2g} "
                f"with respect to token {position}: it reads the future"
            )
        if not bool((grad[:, :t] != 0).any()):
            raise AssertionError(f"the outputs before position {t} have no gradient at all")


@probe()
def prefixes_agree(case: Case) -> None:
    """Runs the first 1, 2, 17, 63 tokens alone: odd lengths, and no length may change what came
    before."""
    model, text = case.model().eval(), case.text()
    with torch.no_grad():
        whole = case.run(model, text)
        for n in (1, 2, 17, 63, case.length - 1):
            expect_close(
                case.run(model, text[:, :n]),
                whole[:, :n],
                case.close,
                f"the output of the first {n} tokens alone, against {case.length} tokens,",
                "it depends on how long the text is",
            )
