"""Probes of decoding: with a cache, any cutting of the text gives the outputs of one forward."""

from __future__ import annotations

import torch
from torch import Tensor

from gsa_platform.model.transformer import Transformer
from gsa_platform.testing.case import Case
from gsa_platform.testing.check import probe
from gsa_platform.testing.compare import expect_close
from gsa_platform.testing.isolation import documents

VERDICT = "decoding does not give what one forward gives"


def chunk_ends(length: int) -> list[int]:
    """Ends of uneven pieces: single tokens, inside tiles, across their borders."""
    return [*(n for n in (1, 7, 16, 17, 40, 64, 65, 90) if n < length), length]


def decode(
    case: Case, model: Transformer, text: Tensor, ends: list[int], docs: Tensor | None = None
) -> Tensor:
    """hidden_BTD of the text given to a cache piece by piece."""
    cache, pieces, start = model.new_cache(), [], 0
    torch.manual_seed(0)
    for end in ends:
        known = None if docs is None else docs[:, :end]
        pieces.append(model(text[:, start:end], known, cache=cache).hidden_BTD)
        start = end
    return torch.cat(pieces, 1)


@probe("decode")
def decoding_in_chunks_is_one_forward(case: Case) -> None:
    """Feeds the text in uneven pieces through the cache and compares with one forward."""
    model, text = case.model().eval(), case.text()
    with torch.no_grad():
        whole = case.run(model, text)
        ends = chunk_ends(case.length)
        got = decode(case, model, text, ends)
    expect_close(got, whole, case.close, f"decoding in pieces ending at {ends}", VERDICT)


@probe("decode")
def decoding_by_token_is_one_forward(case: Case) -> None:
    """Feeds single tokens through the cache, once a text in which no token repeats and once one
    of seven tokens, whose equal keys tie."""
    model = case.model("model.n_layers=1").eval()
    ends = list(range(1, case.length + 1))
    for text, kind in ((case.text(), ""), (case.text(seed=2) % 7, " of a text of seven tokens")):
        with torch.no_grad():
            whole, got = case.run(model, text), decode(case, model, text, ends)
        expect_close(got, whole, case.close, f"decoding token by token{kind}", VERDICT)


@probe("decode", "varlen")
def decoding_keeps_documents_apart(case: Case) -> None:
    """Feeds two documents in pieces through the cache and compares with one forward."""
    model, text = case.model().eval(), case.text()
    docs = documents(text, [37, 60])
    with torch.no_grad():
        whole = case.run(model, text, docs)
        got = decode(case, model, text, chunk_ends(case.length), docs)
    what = "decoding documents that begin at 37 and 60 in pieces"
    expect_close(got, whole, case.close, what, VERDICT)
