"""Whole models: another attention over the same Selection is the same model."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from test_properties import (
    CUTS,
    LENGTH,
    build,
    gradients,
    hidden,
    largest_tensor,
    loss_of,
    tokens,
)

needs_xformers = pytest.mark.skipif(
    importlib.util.find_spec("xformers") is None, reason="xformers is not installed"
)
BUDGET = ["sparsity=fixed", "sparsity.k=64", "sparsity.window=16", "sparsity.sinks=4"]
SMALL = ["indexer.heads=4", "indexer.dim=8", "gate=dual", *BUDGET]
TILE_16 = ["attention.mode=tile", "attention.key_block=16", "attention.query_tile=16"]
TILE_8 = ["attention.mode=tile", "attention.key_block=8", "attention.query_tile=16"]
BLOCK = ["attention.mode=block", "attention.key_block=16"]
KV = ["attention.selection_heads=kv", "indexer.block_score=max"]
KL = ["objective=kl", "objective.dense_rows=2"]
SPARSE = {
    "xformers_sparse-kl": ("xformers_sparse", TILE_16, KL),
    "xformers_sparse-bias": ("xformers_sparse", TILE_16, ["objective=bias"]),
    "xformers_sparse-kv": ("xformers_sparse", [*TILE_16, *KV], KL),
    "flex-tile": ("flex", TILE_8, ["objective=none"]),
    "flex-block": ("flex", BLOCK, [*KL, "objective.selected=false"]),
    "flex-kv": ("flex", [*TILE_16, *KV], [*KL, "objective.selected=false"]),
}
WHOLE = {
    "dense-math": ["attention=dense", "attention.backend=math"],
    "window": ["attention=sliding_window", "attention.window=9"],
    "window-sinks": ["attention=sliding_window", "attention.window=9", "attention.sinks=3"],
}
EVERY = [*SPARSE, *WHOLE]


def cases(names):
    marked = [pytest.param(n, marks=[needs_xformers] if "xformers" in n else []) for n in names]
    return pytest.mark.parametrize("case", marked)


def build_case(case, attention=""):
    """A model of the case; `attention` takes the place of its own."""
    if case in WHOLE:
        return build(*WHOLE[case], "gate=dual")
    own, granularity, objective = SPARSE[case]
    return build(f"attention={attention or own}", *granularity, *SMALL, *objective)


def documents():
    docs = torch.zeros(2, LENGTH, dtype=torch.long)
    docs[0, 37:], docs[1, 60:] = 37, 60
    return docs


@cases(SPARSE)
@pytest.mark.parametrize("docs", [None, documents()], ids=["one_doc", "docs"])
def test_it_is_the_model_with_gsa(case, docs):
    model, gsa = build_case(case), build_case(case, "gsa")
    got, expected = hidden(model, tokens(), docs), hidden(gsa, tokens(), docs)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@cases(SPARSE)
def test_its_loss_and_gradients_are_those_with_gsa(case):
    model, gsa = build_case(case), build_case(case, "gsa")
    torch.testing.assert_close(loss_of(model, tokens()), loss_of(gsa, tokens()), rtol=0, atol=1e-9)
    got, expected = gradients(model, tokens()), gradients(gsa, tokens())
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-9)


@cases(EVERY)
def test_later_tokens_change_nothing(case):
    model = build_case(case)
    text = tokens()
    before = hidden(model, text)
    for t in (1, 17, 63, 99):
        other = text.clone()
        other[:, t:] = tokens(seed=5)[:, t:]
        after = hidden(model, other)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-12)
        assert not torch.equal(after[:, t:], before[:, t:])


@cases(EVERY)
@pytest.mark.parametrize(
    ("docs", "cuts"),
    [(None, "token_by_token"), (None, "chunks"), (documents(), "chunks")],
    ids=["token_by_token-one_doc", "chunks-one_doc", "chunks-docs"],
)
def test_decoding_is_the_full_forward(case, docs, cuts):
    model = build_case(case).eval()
    text = tokens()
    with torch.no_grad():
        whole = hidden(model, text, docs)
        cache, pieces = model.new_cache(), []
        for low, high in zip([0, *CUTS[cuts]], [*CUTS[cuts], LENGTH]):
            seen = None if docs is None else docs[:, :high]
            pieces.append(model(text[:, low:high], seen, cache=cache).hidden_BTD)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-9)


@cases(WHOLE)
def test_documents_do_not_see_each_other(case):
    model, docs, text = build_case(case), documents(), tokens()
    before = hidden(model, text, docs)
    other = text.clone()
    other[0, :37], other[1, :60] = tokens(seed=6)[0, :37], tokens(seed=6)[1, :60]
    after = hidden(model, other, docs)
    assert torch.equal(after[0, 37:], before[0, 37:])
    assert torch.equal(after[1, 60:], before[1, 60:])


@cases(EVERY)
def test_activation_checkpointing_changes_nothing(case):
    model = build_case(case)
    plain = gradients(model, tokens())
    model.activation_checkpointing = True
    again = gradients(model, tokens())
    for name, value in plain.items():
        assert torch.equal(again[name], value), name


@cases(EVERY)
def test_diagnostics_see_it(case):
    model = build_case(case).eval()
    with torch.no_grad():
        reports = model(tokens(), probe=True).reports
    for report in reports:
        covered = report.probe["covered"]
        assert len(covered) and (covered > 0).all() and (covered <= 1 + 1e-9).all()


@pytest.mark.parametrize("attention", ["sliding_window", "flex", "xformers_sparse"])
def test_no_tensor_is_quadratic_in_the_context(attention, monkeypatch):
    if attention == "xformers_sparse":
        pytest.importorskip("xformers")
        from gsa_plugins.attention import xformers_sparse

        monkeypatch.setitem(xformers_sparse._CHUNK, "cpu", 1)
    overrides = [f"attention={attention}"]
    if attention == "sliding_window":
        overrides += ["attention.window=100", "attention.sinks=4"]
    else:
        overrides += ["sparsity=fixed", "sparsity.k=256", "sparsity.window=64"]
        overrides += ["indexer.dim=8", "objective=none"]
    short, long = (largest_tensor(n, *overrides) for n in (2048, 4096))
    assert long < 3 * short and long < 4096 * 4096 // 4
