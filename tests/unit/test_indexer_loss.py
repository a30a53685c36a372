"""The indexer's training signals: values, gradients, and that they teach it to find keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import causal, granularity_id, make_documents, make_factors

from gsa_kernels.attention_mass import probe
from gsa_kernels.index_score.api import scores_at
from gsa_kernels.index_score.reference import block_score_matrix
from gsa_kernels.indexer_loss import reference
from gsa_kernels.indexer_loss.api import DISTRIBUTIONS, dense_kl, log_score_bias, selected_kl
from gsa_kernels.select.api import select
from gsa_kernels.selection import Selection, SelectionSpec, tile_layout
from gsa_kernels.sparse_attention.api import sparse_attention
from gsa_platform.contracts import LayerDims, Sequence
from gsa_plugins.configs import GatedLightningConfig, ReluLightningConfig
from gsa_plugins.indexer import GatedLightningIndexer, ReluLightningIndexer

LENGTH = 130
PARTS = ("q_BTJI", "k_BSI", "weight_BTJ", "bias_J")

granularities = pytest.mark.parametrize(
    "granularity", [(1, 1), (8, 1), (16, 12), (5, 7)], ids=granularity_id
)
documents = pytest.mark.parametrize("documents", [False, True], ids=["one_doc", "docs"])
kinds = pytest.mark.parametrize(
    ("block_score", "activation"),
    [("mean", "sigmoid"), ("max", "relu")],
    ids=["gated", "relu_max"],
)
scoring = pytest.mark.parametrize("block_score", ["mean", "max"])
activations = pytest.mark.parametrize("activation", ["sigmoid", "relu"])
distributions = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
selection_heads = pytest.mark.parametrize("heads", [1, 2], ids=["shared", "kv"])


def learnable(factors):
    return replace(factors, **{n: getattr(factors, n).clone().requires_grad_() for n in PARTS})


def make_case(granularity, heads, block_score, documents, activation="sigmoid"):
    """(factors, spec, documents, q, k) with 4 query heads over 2 key-value heads."""
    factors = make_factors(
        LENGTH, heads=heads, block_score=block_score, activation=activation, seed=3
    )
    spec = SelectionSpec(*granularity, window=7, sinks=3, heads=heads)
    g = torch.Generator().manual_seed(4)
    q = torch.randn(2, LENGTH, 4, 8, generator=g, dtype=torch.float64)
    k = torch.randn(2, LENGTH, 2, 8, generator=g, dtype=torch.float64)
    docs = make_documents(LENGTH) if documents else None
    return learnable(factors), spec, docs, q, k


def probabilities(q, k, mask):
    """[B, H, T, S] softmax attention over a mask [B, 1 or K, T, S]."""
    k = k.repeat_interleave(2, 2)
    logits = torch.einsum("bthe,bshe->bhts", q, k) * q.shape[-1] ** -0.5
    mask = mask.expand(2, -1, -1, -1)
    mask = mask.repeat_interleave(4 // mask.shape[1], 1)
    return logits.masked_fill(~mask, -torch.inf).softmax(-1)


def gradients(loss, factors):
    assert loss.ndim == 0 and torch.isfinite(loss)
    return torch.autograd.grad(loss, [getattr(factors, n) for n in PARTS])


def assert_same_loss(loss, expected, factors):
    assert loss > 0
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-9)
    for name, a, b in zip(PARTS, gradients(loss, factors), gradients(expected, factors)):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@granularities
@selection_heads
@kinds
@documents
@distributions
def test_selected_kl(granularity, heads, block_score, documents, activation, distribution):
    factors, spec, docs, q, k = make_case(granularity, heads, block_score, documents, activation)
    selection = select(factors, spec, 90, 90, LENGTH, docs).selection
    mass = sparse_attention(q, k, k, selection, need_mass=True).mass_BHQN
    loss = selected_kl(factors, selection, mass, distribution)
    p = probabilities(q, k, selection.to_dense_mask())
    lists = [
        [[[j for j in row if j >= 0] for row in tiles] for tiles in per_head]
        for per_head in selection.blocks_BHQN.tolist()
    ]
    assert_same_loss(loss, reference.kl(factors, p, spec, lists, docs, distribution), factors)


@granularities
@selection_heads
@kinds
@documents
@distributions
def test_dense_kl(granularity, heads, block_score, documents, activation, distribution):
    factors, spec, docs, q, k = make_case(granularity, heads, block_score, documents, activation)
    layout = tile_layout(spec, LENGTH, LENGTH, doc_start_BS=docs)
    tiles = torch.arange(layout.n_tiles)
    loss = dense_kl(factors, q, k, spec, tiles, docs, distribution)
    p = probabilities(q, k, causal(LENGTH, docs))
    allowed = layout.candidates(slice(None), LENGTH // spec.key_block).expand(2, -1, -1)
    lists = [[[r.nonzero().flatten().tolist() for r in rows]] * heads for rows in allowed]
    assert_same_loss(loss, reference.kl(factors, p, spec, lists, docs, distribution), factors)


@distributions
def test_no_candidates_is_no_loss(distribution):
    factors, spec, _, q, k = make_case((8, 1), 1, "mean", False)
    wide = replace(spec, window=LENGTH)
    selection = select(factors, wide, 200, 200, LENGTH).selection
    mass = torch.zeros(selection.blocks_BHQN.shape, dtype=torch.float64)
    assert float(selected_kl(factors, selection, mass, distribution)) == 0
    assert float(dense_kl(factors, q, k, wide, torch.arange(LENGTH), None, distribution)) == 0
    early = dense_kl(factors, q, k, spec, torch.arange(5), None, distribution)
    assert float(early) == 0


@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
@distributions
def test_gradients_are_finite_where_slots_are_empty(activation, distribution):
    factors = learnable(make_factors(LENGTH, activation=activation))
    # ReLU scores of exactly 0, and signed weights below 0.
    factors = replace(
        factors,
        bias_J=torch.full((4,), -50.0, dtype=torch.float64, requires_grad=True),
        weight_BTJ=(factors.weight_BTJ.detach() - 0.5).requires_grad_(),
    )
    spec = SelectionSpec(4, 16, window=7)
    selection = select(factors, spec, 110, 110, LENGTH).selection
    assert (selection.blocks_BHQN < 0).any()
    mass = torch.rand(selection.blocks_BHQN.shape, dtype=torch.float64)
    for loss in (
        selected_kl(factors, selection, mass, distribution),
        log_score_bias(factors, selection, 1.0).sum(),
    ):
        assert all(torch.isfinite(x).all() for x in gradients(loss, factors))


def test_an_unknown_distribution_is_refused():
    factors, spec, _, q, k = make_case((8, 1), 1, "mean", False)
    with pytest.raises(ValueError, match="'sharp' is not one of"):
        dense_kl(factors, q, k, spec, torch.tensor([90]), None, "sharp")


@granularities
@selection_heads
@scoring
@documents
def test_scores_at_the_selection(granularity, heads, block_score, documents):
    factors, spec, docs, _, _ = make_case(granularity, heads, block_score, documents)
    selection = select(factors, spec, 90, 90, LENGTH, docs).selection
    blocks = selection.blocks_BHQN
    matrix = block_score_matrix(factors, spec.key_block, docs)[:, :, selection.layout.anchor_Q]
    expected = matrix.gather(-1, blocks.long().clamp_min(0)).masked_fill(blocks < 0, -torch.inf)
    torch.testing.assert_close(scores_at(factors, selection), expected)


@granularities
@selection_heads
@activations
@documents
def test_log_score_bias(granularity, heads, activation, documents):
    factors, spec, docs, _, _ = make_case(granularity, heads, "mean", documents, activation)
    selection = select(factors, spec, 90, 90, LENGTH, docs).selection
    blocks = selection.blocks_BHQN
    bias = log_score_bias(factors, selection, 0.5)
    matrix = block_score_matrix(factors, spec.key_block, docs)[:, :, selection.layout.anchor_Q]
    share = matrix.gather(-1, blocks.long().clamp_min(0))
    share = share / (4 // heads if activation == "sigmoid" else 1)
    expected = (0.5 * (share + 1e-6).log()).masked_fill(blocks < 0, 0)
    torch.testing.assert_close(bias, expected)
    if activation == "sigmoid":
        assert (bias <= 0).all()
    pairs = zip(gradients(bias.sum(), factors), gradients(expected.sum(), factors))
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def test_log_score_bias_inside_a_tile_goes_on_with_the_previous_one():
    factors, spec, _, _, _ = make_case((4, 16), 1, "mean", False)
    whole = select(factors, spec, 90, 90, LENGTH).selection
    bias = log_score_bias(factors, whole, 1.0)
    piece = replace(factors.rows(torch.arange(20, LENGTH)), q_start=20)
    part = Selection(spec, whole.blocks_BHQN[:, :, 1:], LENGTH - 20, LENGTH, 20)
    torch.testing.assert_close(log_score_bias(piece, part, 1.0, bias[:, :, 1:2]), bias[:, :, 1:])
    with pytest.raises(ValueError, match="previous bias is needed"):
        log_score_bias(piece, part, 1.0)


def planted(length, run, clusters=8, width=16):
    """(x, q, k): tokens in clusters of `run` neighbours; each attends its own cluster."""
    g = torch.Generator().manual_seed(7)
    centre = torch.nn.functional.normalize(torch.randn(clusters, width, generator=g), dim=-1)
    label = torch.randint(clusters, (length // run,), generator=g).repeat_interleave(run)
    x = centre[label] * width**0.5
    x = (x + 0.1 * torch.randn(length, width, generator=g))[None]
    q = torch.stack([x * 1.5] * 2, 2)
    return x, q, x[:, :, None]


@pytest.mark.parametrize("granularity", [(1, 1), (8, 16)], ids=granularity_id)
@pytest.mark.parametrize("kind", ["gated", "relu"])
@pytest.mark.parametrize(
    ("signal", "distribution"), [("dense", "softmax"), ("dense", "log"), ("selected", "log")]
)
def test_training_raises_the_recall(granularity, kind, signal, distribution):
    torch.manual_seed(0)
    token = granularity == (1, 1)
    length = 128 if token else 512
    x, q, k = planted(length, 1 if token else 16)
    dims = LayerDims(16, 2, 1, 16, length)
    if kind == "gated":
        indexer = GatedLightningIndexer(GatedLightningConfig(heads=4, dim=16), dims)
    else:
        indexer = ReluLightningIndexer(ReluLightningConfig(heads=4, dim=16), dims)
    before = {n: p.detach().clone() for n, p in indexer.named_parameters()}
    spec = SelectionSpec(*granularity, window=2)
    budget = 2 + length // 4
    layout = tile_layout(spec, length, length)
    seq = Sequence()

    def recall():
        with torch.no_grad():
            selection = select(indexer(x, seq, spec), spec, budget, budget, length).selection
        seen = probe(q, k, layout, list(range(layout.n_tiles // 2, layout.n_tiles)), selection)
        assert (seen.got <= seen.best + 1e-6).all() and (seen.hits <= seen.wanted).all()
        return float(seen.got.sum() / seen.possible.sum())

    start = recall()
    optimizer = torch.optim.Adam(indexer.parameters(), lr=0.02)
    g = torch.Generator().manual_seed(0)
    for _ in range(60):
        factors = indexer(x, seq, spec)
        if signal == "dense":
            tiles = torch.randperm(layout.n_tiles, generator=g)[:12]
            loss = dense_kl(factors, q, k, spec, tiles, None, distribution)
        else:
            selection = select(factors, spec, budget, budget, length).selection
            mass = sparse_attention(q, k, k, selection, need_mass=True).mass_BHQN
            loss = selected_kl(factors, selection, mass, distribution)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    end = recall()
    assert end > start + 0.15 and end > 0.6
    for name, parameter in indexer.named_parameters():
        assert not torch.equal(parameter, before[name]), name
