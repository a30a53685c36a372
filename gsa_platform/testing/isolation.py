"""Probes of isolation: sequences of a batch and documents of a sequence do not see each other."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gsa_platform.testing.case import Case, layers
from gsa_platform.testing.check import probe
from gsa_platform.testing.compare import difference, expect_close, expect_identical


def documents(text: Tensor, starts: list[int]) -> Tensor:
    """doc_start_BS with a second document that begins at starts[b] in sequence b."""
    docs = torch.zeros_like(text)
    for b, start in enumerate(starts):
        docs[b, start:] = start
    return docs


@probe()
def batch_mates_change_nothing(case: Case) -> None:
    """Replaces the second sequence of a batch: the first one's output must stay, bit by bit."""
    model, text = case.model(), case.text()
    before = case.run(model, text)
    after = case.run(model, torch.stack([text[0], case.text(seed=4)[1]]))
    expect_identical(
        after[:1],
        before[:1],
        "changing sequence 1 of the batch (of sequence 0)",
        "it mixes the batch",
    )
    if difference(after[1:], before[1:])[0] < 0:
        raise AssertionError("changing sequence 1 of the batch did not change its own output")


@probe()
def batch_order_changes_nothing(case: Case) -> None:
    """Reorders a batch of three and runs one sequence alone: outputs must move along."""
    model, text = case.model(), case.text(batch=3)
    before = case.run(model, text)
    order = [2, 0, 1]
    verdict = "a sequence's output depends on its place in the batch"
    what = "the output of a batch in the order 2, 0, 1"
    expect_close(case.run(model, text[order]), before[order], case.close, what, verdict)
    alone = case.run(model, text[1:2])
    what = "the output of sequence 1 without the others"
    expect_close(alone, before[1:2], case.close, what, "it depends on the rest of the batch")


@probe("varlen")
def documents_stay_apart(case: Case) -> None:
    """Replaces the first document of each sequence: the outputs of the second must stay, bit by
    bit, with borders on and off multiples of 16."""
    model, text = case.model(), case.text()
    for border in (37, 48):
        docs = documents(text, [border, border])
        before = case.run(model, text, docs)
        other = text.clone()
        other[:, :border] = case.text(seed=6)[:, :border]
        expect_identical(
            case.run(model, other, docs)[:, border:],
            before[:, border:],
            f"changing the document before position {border}",
            "it looks across the border of documents",
            border,
        )


@probe("varlen")
def a_document_in_the_middle_is_the_document_alone(case: Case) -> None:
    """Runs the second document of a sequence by itself: the same outputs, wherever it begins."""
    model, text = case.model(), case.text()
    align = case.entry.component.trial.align
    layer = layers(model)[0]
    if layer.indexer is not None:
        spec = layer.attention.selection_spec(layer.sparsity)
        # Blocks and tiles lie at absolute positions: only an aligned document meets the same ones.
        align = math.lcm(align, getattr(spec, "key_block", 1), getattr(spec, "query_tile", 1))
    border = align * max(1, case.length // (2 * align))
    if border >= case.length:
        border = 0
    got = case.run(model, text, documents(text, [border, border]))[:, border:]
    # Rotary embeddings see distances only, up to the float32 of their tables.
    expect_close(
        got,
        case.run(model, text[:, border:]),
        max(case.close, 1e-4),
        f"the document that begins at {border}, against the document alone,",
        "where a document begins changes it",
        border,
    )


@probe("varlen")
def one_document_spelled_out_changes_nothing(case: Case) -> None:
    """Gives document starts that are all 0, which is what no document starts mean."""
    model, text = case.model(), case.text()
    expect_close(
        case.run(model, text, torch.zeros_like(text)),
        case.run(model, text),
        case.close,
        "the output with document starts of all 0, against none,",
        "it treats one document as another thing than no documents",
    )
