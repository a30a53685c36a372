"""The properties of test_properties.py, for every other first-party component, one case each."""

from __future__ import annotations

import pytest
import torch
from test_properties import (
    CUTS,
    LENGTH,
    MODES,
    VOCABULARY,
    build,
    gradients,
    hidden,
    largest_tensor,
    tokens,
)

from gsa_kernels.index_score import api as index_score
from gsa_kernels.sparse_attention import eager
from gsa_platform.errors import UserError

FORCED = ["sparsity.window=8", "sparsity.sinks=4"]
FIXED = ["sparsity=fixed", "sparsity.k=44", *FORCED]
BOUNDS = ["sparsity.k_min=24", "sparsity.k_max=64", *FORCED]
ENTROPY = ["sparsity=adaptive_entropy", "sparsity.k=44", *BOUNDS]
FREE = "objective=none"  # for indexers that have nothing to learn
HEADS = ["indexer.heads=4", "indexer.dim=8"]
POOLED = ["indexer=pooled", "indexer.pool=16", *HEADS]
COARSE = ["indexer=hierarchical", "indexer.pool=16", "indexer.survivors=3", *HEADS]
LIGHTNING = ["indexer=gated_lightning", *HEADS]
TILE_KV = [x for x in MODES["tile_kv"] if "indexer" not in x]

CASES = {
    "pooled_token": [*MODES["token"], *POOLED, *FIXED],
    "pooled_block_max": [*MODES["block"], *POOLED, *FIXED, "indexer.pooling=max"],
    "pooled_tile_bias": [*MODES["tile"], *POOLED, *FIXED, "objective=bias"],
    "pooled_kv_relu": [*TILE_KV, *POOLED, *ENTROPY, "indexer.activation=relu"],
    "coarse_token": [*MODES["token"], *COARSE, *FIXED, "indexer.pool=8"],
    "coarse_block": [*MODES["block"], *COARSE, *FIXED, "indexer.block_score=max"],
    "coarse_tile": [*MODES["tile"], *COARSE, *ENTROPY, "objective=kl_bias"],
    "coarse_kv": [*TILE_KV, *COARSE, *FIXED, "indexer.block_score=max", "indexer.pool=8"],
    "oracle_token": [*MODES["token"], "indexer=oracle", *FIXED, FREE],
    "oracle_tile": [*MODES["tile"], "indexer=oracle", *ENTROPY, FREE],
    "oracle_kv": [*TILE_KV, "indexer=oracle", *FIXED, FREE],
    "random_token": [*MODES["token"], "indexer=random", *FIXED, FREE],
    "random_kv": [*TILE_KV, "indexer=random", *FIXED, FREE],
    "strided_block": [*MODES["block"], "indexer=strided", *FIXED, FREE],
    "strided_tile": [*MODES["tile"], "indexer=strided", "indexer.stride=3", *FIXED, FREE],
    "entropy_token": [*MODES["token"], *LIGHTNING, *ENTROPY, "sparsity.sign=decreasing"],
    "entropy_logistic": [*MODES["tile"], *LIGHTNING, *ENTROPY, "sparsity.form=logistic"],
    "top_p_token": [*MODES["token"], *LIGHTNING, "sparsity=top_p", "sparsity.p=0.6", *BOUNDS],
    "top_p_tile": [*MODES["tile"], *LIGHTNING, "sparsity=top_p", "sparsity.p=0.5", *BOUNDS],
    "learned_token": [*MODES["token"], *LIGHTNING, "sparsity=learned", "sparsity.k=44", *BOUNDS],
    "learned_tile": [*MODES["tile"], *LIGHTNING, "sparsity=learned", "sparsity.k=44", *BOUNDS],
    "scheduled": [*MODES["tile"], *LIGHTNING, "sparsity=scheduled", "sparsity.k=44", *FORCED],
    "silu": [*MODES["tile"], *LIGHTNING, *FIXED, "gate=dual", "gate.activation=silu"],
    "tanh_headwise": [
        *MODES["token"], *LIGHTNING, *FIXED, "gate=output", "gate.activation=tanh",
        "gate.granularity=headwise", "gate.bias=-0.5",
    ],
    "kl_bias": [*MODES["block"], *LIGHTNING, *FIXED, "objective=kl_bias"],
}  # fmt: skip
BLIND = ("random", "strided")  # choose by position: equal for every content
every_case = pytest.mark.parametrize("case", CASES)
STEP = 10_000  # past every schedule


def model_of(case: str, *more: str):
    """A model in which the component's choices matter: weights off zero, running values set."""
    model = build(*CASES[case], *more)
    g = torch.Generator().manual_seed(3)
    for block in model.blocks:
        sparsity = block.attention.sparsity
        with torch.no_grad():
            for p in sparsity.parameters():
                p += 0.5 * torch.randn(p.shape, generator=g, dtype=p.dtype)
    model.observe([r.statistics for r in model(tokens(seed=9), step=STEP).reports])
    return model


def run(model, text, docs=None):
    return model(text, docs, step=STEP).hidden_BTD


@every_case
def test_the_case_prunes(case):
    reports = model_of(case)(tokens(), step=STEP, probe=True).reports
    for report in reports:
        assert report.keys["max"] < 90
    budgets = torch.cat([r.keys_BHT[..., 80:].flatten() for r in reports]).unique()
    if any(x in case for x in ("entropy", "top_p", "learned_token")):
        assert len(budgets) > 2


@every_case
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_later_tokens_change_nothing(case, training):
    model = model_of(case).train(training)
    text = tokens()
    before = run(model, text)
    for t in (1, 17, 50, 99):
        other = text.clone()
        other[:, t:] = (other[:, t:] + 1 + tokens(seed=5)[:, t:] % (VOCABULARY - 1)) % VOCABULARY
        after = run(model, other)
        assert torch.equal(after[:, :t], before[:, :t]), t
        assert not torch.equal(after[:, t:], before[:, t:])


@every_case
def test_samples_and_documents_do_not_see_each_other(case):
    model = model_of(case)
    text = tokens()
    other = torch.stack([text[0], tokens(seed=4)[1]])
    before, after = run(model, text), run(model, other)
    assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])
    for boundary in (37, 48):
        docs = torch.zeros(2, LENGTH, dtype=torch.long)
        docs[:, boundary:] = boundary
        before = run(model, text, docs)
        other = text.clone()
        other[:, :boundary] = tokens(seed=6)[:, :boundary]
        after = run(model, other, docs)
        assert torch.equal(after[:, boundary:], before[:, boundary:])
        assert not torch.equal(after[:, :boundary], before[:, :boundary])
    # Aligned to blocks, tiles and pools: the document alone.
    alone = run(model, text[:, boundary:])
    torch.testing.assert_close(before[:, boundary:], alone, rtol=0, atol=1e-5)


PIECEWISE = [(case, "chunks", documents) for case in CASES for documents in (False, True)]
PIECEWISE += [
    (case, "token_by_token", False)
    for case in CASES
    if case.endswith(("_token", "_tile", "_kv")) and case not in ("oracle_kv", "random_kv")
]


@pytest.mark.parametrize(("case", "cuts", "documents"), PIECEWISE)
def test_decoding_is_the_full_forward(case, cuts, documents):
    model = model_of(case).eval()
    text, docs = tokens(), None
    if documents:
        docs = torch.zeros(2, LENGTH, dtype=torch.long)
        docs[0, 37:], docs[1, 60:] = 37, 60
    with torch.no_grad():
        whole = hidden(model, text, docs)
        cache, pieces = model.new_cache(), []
        for low, high in zip([0, *CUTS[cuts]], [*CUTS[cuts], LENGTH]):
            held = None if docs is None else docs[:, :high]
            pieces.append(model(text[:, low:high], held, cache=cache).hidden_BTD)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-9)
    kept = [layer.index_pooled_BMI for layer in cache]
    if case.startswith(("pooled", "coarse")):
        pool = model.blocks[0].attention.indexer.pool
        assert {x.shape[1] for x in kept} == {LENGTH // pool}
    else:
        assert kept == [None] * len(kept)


# A bias changes attention also where nothing is pruned.
BIASED = {"objective=bias", "objective=kl_bias"}
UNBIASED = [case for case, chosen in CASES.items() if not BIASED & set(chosen)]


@pytest.mark.parametrize("case", UNBIASED)
def test_a_budget_for_every_key_is_dense_attention(case):
    full = ["sparsity=fixed", "sparsity.k=1000", *FORCED]
    chosen = [x for x in CASES[case] if not x.startswith(("sparsity", "indexer.survivors"))]
    more = ["indexer.survivors=100"] if "coarse" in case else []
    sparse = build(*chosen, *full, *more)
    gate = [x for x in chosen if x.startswith("gate")]
    dense = build("attention=dense", *gate, seed=1)
    state = sparse.state_dict()
    dense.load_state_dict({n: state[n] for n in dense.state_dict()})
    torch.testing.assert_close(
        hidden(sparse, tokens()), hidden(dense, tokens()), rtol=0, atol=1e-10
    )


@every_case
def test_every_parameter_that_should_learn_does(case):
    model = model_of(case)
    found = gradients(model, tokens())
    for name, parameter in model.named_parameters():
        if "sparsity" in name:
            assert name not in found  # learns from its own loss only
        elif "head_bias" not in name:
            assert name in found and (parameter.grad != 0).any(), name


@every_case
def test_activation_checkpointing_changes_nothing(case):
    model = model_of(case)
    plain = gradients(model, tokens())
    model.activation_checkpointing = True
    again = gradients(model, tokens())
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[name], value) for name, value in plain.items())


@pytest.mark.parametrize("case", ["learned_token", "learned_tile"])
def test_the_budget_loss_moves_only_the_controller(case):
    model = model_of(case)
    reports = model(tokens()).reports
    assert all(r.budget_loss is not None and r.budget_loss > 0 for r in reports)
    sum(r.budget_loss for r in reports).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("sparsity" in name), name
    assert all(r.budget_loss is None for r in model.eval()(tokens()).reports)


def test_a_schedule_goes_from_dense_to_sparse():
    settings = [*CASES["scheduled"], "sparsity.steps=100", FREE]
    model, dense = build(*settings), build("attention=dense", seed=1)
    state = model.state_dict()
    dense.load_state_dict({n: state[n] for n in dense.state_dict()})
    torch.testing.assert_close(
        hidden(model, tokens()), hidden(dense, tokens()), rtol=0, atol=1e-10
    )
    keys = [float(model(tokens(), step=s).reports[0].keys["max"]) for s in (0, 50, 80, 100, 200)]
    assert keys == sorted(keys, reverse=True) and keys[0] > keys[2] > keys[3] == keys[4]
    assert float(model.eval()(tokens(), step=0).reports[0].keys["max"]) == keys[3]


@pytest.mark.parametrize("indexer", ["oracle", "random", "strided"])
@pytest.mark.parametrize("objective", ["kl", "bias", "kl_bias"])
def test_an_objective_needs_something_to_train(indexer, objective):
    with pytest.raises(UserError, match="has no parameters"):
        build(f"indexer={indexer}", f"objective={objective}", *FIXED, *MODES["tile"])


LINEAR = {
    "pooled": ["indexer=pooled", "indexer.pool=64", "objective=kl", "indexer.dim=8"],
    "coarse": ["indexer=hierarchical", "indexer.pool=128", "indexer.survivors=6", "indexer.dim=8"],
    "oracle": ["indexer=oracle", FREE],
    "random": ["indexer=random", FREE],
    "strided": ["indexer=strided", FREE],
    "top_p": ["sparsity=top_p", "sparsity.k_max=256", "sparsity.k_min=128", "indexer.dim=8"],
    "learned": ["sparsity=learned", "sparsity.k=256", "sparsity.k_max=256", "indexer.dim=8"],
    "kl_bias": ["objective=kl_bias", "indexer.dim=8"],
}


@pytest.mark.parametrize("name", LINEAR)
def test_no_tensor_is_quadratic_in_the_context(name, monkeypatch):
    for module in (eager, index_score):
        monkeypatch.setitem(module._CHUNK, "cpu", 1 << 17)
    budget = ["sparsity.window=64", "sparsity.sinks=64"]
    if not any(x.startswith("sparsity=") for x in LINEAR[name]):
        budget += ["sparsity=fixed", "sparsity.k=256"]
    overrides = ["attention.mode=tile", *budget, *LINEAR[name]]
    short, long = (largest_tensor(n, *overrides) for n in (2048, 4096))
    assert long < 3 * short and long < 4096 * 4096 // 8


@pytest.mark.parametrize("name", ["pooled", "coarse", "oracle", "random", "top_p"])
def test_single_queries_hold_no_quadratic_tensor(name, monkeypatch):
    for module in (eager, index_score):
        monkeypatch.setitem(module._CHUNK, "cpu", 1 << 16)
    small = {"sparsity.k_max=256": "sparsity.k_max=64", "sparsity.k_min=128": "sparsity.k_min=32"}
    chosen = [small.get(x, x) for x in LINEAR[name] if not x.startswith("objective")]
    if not any(x.startswith("sparsity=") for x in chosen):
        chosen += ["sparsity=fixed", "sparsity.k=44"]
    overrides = [*MODES["token"], *FORCED, *chosen, FREE, "indexer.pool=16"]
    overrides = [x for x in overrides if "pool" not in x or name in ("pooled", "coarse")]
    short, long = (largest_tensor(n, *overrides) for n in (1024, 2048))
    assert long < 3 * short and long < 2048 * 2048 // 4


@every_case
def test_mixed_precision_trains(case):
    model = model_of(case).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens())
        loss = out.hidden_BTD.float().square().mean()
        for r in out.reports:
            loss = loss + sum(x for x in (r.index_loss, r.budget_loss) if x is not None)
    assert loss.dtype == torch.float32
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
