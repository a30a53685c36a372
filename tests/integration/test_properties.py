"""Properties of the whole model that every combination of components must keep."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gsa_kernels.index_score import api as index_score
from gsa_kernels.sparse_attention import eager
from gsa_platform import compose
from gsa_platform.contracts import Sequence
from gsa_platform.model.transformer import Transformer

LENGTH, VOCABULARY = 100, 211

MODES = {
    "token": ["attention.mode=token"],
    "block": ["attention.mode=block", "attention.key_block=16"],
    "tile": ["attention.mode=tile", "attention.key_block=8", "attention.query_tile=16"],
    "tile_kv": [
        "attention.mode=tile",
        "attention.key_block=4",
        "attention.query_tile=16",
        "attention.selection_heads=kv",
        "indexer.block_score=max",
    ],
}
ADAPTIVE = ["sparsity=adaptive_variance", "sparsity.k=44", "sparsity.k_min=24"]
ADAPTIVE += ["sparsity.k_max=64", "sparsity.window=8", "sparsity.sinks=4"]
SPARSITIES = {
    "fixed": ["sparsity=fixed", "sparsity.k=44", "sparsity.window=8", "sparsity.sinks=4"],
    "decreasing": [*ADAPTIVE, "sparsity.sign=decreasing"],
    "increasing": [*ADAPTIVE, "sparsity.sign=increasing", "sparsity.form=logistic"],
}
OBJECTIVES = {
    "none": ["objective=none"],
    "kl": ["objective=kl", "objective.dense_rows=2"],
    "bias": ["objective=bias"],
}
CASES = [
    (mode, sparsity, gate, objective)
    for mode in ("token", "block", "tile")
    for sparsity, gate, objective in [
        ("fixed", "none", "none"),
        ("fixed", "dual", "kl"),
        ("fixed", "none", "bias"),
        ("decreasing", "dual", "none"),
        ("decreasing", "none", "kl"),
        ("increasing", "dual", "bias"),
    ]
]
CASES += [("tile_kv", "fixed", "dual", "kl"), ("tile_kv", "increasing", "none", "bias")]
FEW = [c for c in CASES if c[1:] in (("fixed", "dual", "kl"), ("increasing", "dual", "bias"))]

every_case = pytest.mark.parametrize("case", CASES, ids="-".join)
few_cases = pytest.mark.parametrize("case", FEW, ids="-".join)
every_mode = pytest.mark.parametrize("mode", MODES)


@functools.cache
def config(*overrides: str):
    return compose.load(
        [
            "picked.hardware=none",
            f"context={LENGTH}",
            "model.d_model=32",
            "model.n_layers=2",
            "model.n_heads=4",
            "model.n_kv_heads=2",
            "model.head_dim=8",
            "model.ffn_dim=48",
            *overrides,
        ]
    )


def build(*overrides: str, seed: int = 0) -> Transformer:
    """A float64 model whose weights are large enough for its choices to matter."""
    from gsa_platform import registry

    torch.manual_seed(seed)
    model = Transformer(config(*overrides), VOCABULARY, registry.get()).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "indexer.weight_proj.weight" in name or "gate" in name:
                parameter.normal_(std=0.5)
    return model


def build_case(case: tuple[str, str, str, str]) -> Transformer:
    mode, sparsity, gate, objective = case
    small = ["indexer.heads=4", "indexer.dim=8", f"gate={gate}"]
    model = build(*MODES[mode], *SPARSITIES[sparsity], *small, *OBJECTIVES[objective])
    if sparsity != "fixed":
        calibrate(model)
    return model


def calibrate(model: Transformer) -> None:
    """Set the running mean of the variance to that of some other text."""
    report = model(tokens(seed=9)).reports
    model.observe([r.statistics for r in report])
    for block in model.blocks:
        assert block.attention.sparsity.mean_variance > 0


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    """Random text in which no token repeats."""
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(VOCABULARY, generator=g)[:length] for _ in range(batch)])


def hidden(model: Transformer, text: torch.Tensor, docs=None) -> torch.Tensor:
    return model(text, docs).hidden_BTD


def loss_of(model: Transformer, text: torch.Tensor, index_loss: bool = True) -> torch.Tensor:
    out = model(text)
    logits = out.hidden_BTD @ model.head_weight_VD.T
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    extra = [r.index_loss for r in out.reports if r.index_loss is not None]
    return loss + sum(extra) if index_loss else loss


def gradients(model: Transformer, text: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss_of(model, text).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@every_case
def test_the_cases_prune(case):
    model = build_case(case)
    reports = model(tokens()).reports
    for report in reports:
        assert report.keys["max"] < 90
    if case[1] != "fixed":
        attended = [r.keys_BHT for r in model(tokens(), probe=True).reports]
        assert any(len(a[..., 80:].unique()) > 1 for a in attended)


@every_case
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_later_tokens_change_nothing(case, training):
    model = build_case(case).train(training)
    text = tokens()
    before = hidden(model, text)
    for t in (1, 17, 48, 63, 99):
        other = text.clone()
        other[:, t:] = (other[:, t:] + 1 + tokens(seed=5)[:, t:] % (VOCABULARY - 1)) % VOCABULARY
        assert (other[:, t:] != text[:, t:]).all()
        after = hidden(model, other)
        assert torch.equal(after[:, :t], before[:, :t]), t
        assert not torch.equal(after[:, t:], before[:, t:])


@every_case
def test_no_gradient_reaches_later_embeddings(case):
    model = build_case(case)
    held = []

    def keep(_module, _args, output):
        held.append(output.detach().requires_grad_())
        return held[-1]

    model.embedding.register_forward_hook(keep)
    out = hidden(model, tokens())
    weight = torch.randn(out.shape[-1], dtype=out.dtype)
    for t in (1, 17, 63, 96):
        (grad,) = torch.autograd.grad(
            (out[:, :t] @ weight).sin().sum(), held[-1], retain_graph=True
        )
        assert (grad[:, t:] == 0).all(), t
        assert (grad[:, :t] != 0).any()


@every_case
def test_samples_do_not_see_each_other(case):
    model = build_case(case)
    text = tokens()
    before = hidden(model, text)
    other = torch.stack([text[0], tokens(seed=4)[1]])
    after = hidden(model, other)
    assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])


@every_case
@pytest.mark.parametrize("boundary", [37, 48])
def test_documents_do_not_see_each_other(case, boundary):
    model = build_case(case)
    docs = torch.zeros(2, LENGTH, dtype=torch.long)
    docs[:, boundary:] = boundary
    text = tokens()
    before = hidden(model, text, docs)
    other = text.clone()
    other[:, :boundary] = tokens(seed=6)[:, :boundary]
    after = hidden(model, other, docs)
    assert torch.equal(after[:, boundary:], before[:, boundary:])
    assert not torch.equal(after[:, :boundary], before[:, :boundary])
    mixed = hidden(model, text)
    assert not torch.allclose(mixed[:, boundary:], before[:, boundary:])


@few_cases
def test_a_document_in_the_middle_is_the_document_alone(case):
    # Aligned to blocks and tiles; rotary embeddings (float32 tables) only see distances.
    model = build_case(case)
    docs = torch.zeros(2, LENGTH, dtype=torch.long)
    docs[:, 48:] = 48
    text = tokens()
    got = hidden(model, text, docs)[:, 48:]
    torch.testing.assert_close(got, hidden(model, text[:, 48:]), rtol=0, atol=1e-5)


CUTS = {
    "token_by_token": list(range(1, LENGTH)),
    "chunks": [1, 7, 16, 17, 40, 64, 65, 90],
}


@pytest.mark.parametrize(
    ("case", "cuts"),
    [
        pytest.param(case, cuts, id=f"{'-'.join(case)}-{cuts}")
        for case in CASES
        for cuts in CUTS
        if cuts == "chunks" or case in FEW
    ],
)
def test_decoding_is_the_full_forward(case, cuts):
    model = build_case(case).eval()
    text = tokens()
    with torch.no_grad():
        whole = hidden(model, text)
        cache = model.new_cache()
        pieces = []
        for low, high in zip([0, *CUTS[cuts]], [*CUTS[cuts], LENGTH]):
            pieces.append(model(text[:, low:high], cache=cache).hidden_BTD)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-9)


@every_mode
@pytest.mark.parametrize("seed", range(4))
def test_decoding_chooses_the_same_of_equal_keys(mode, seed):
    # Without index RoPE every occurrence of a token has the same index key in the first layer.
    model = build(*MODES[mode], *SPARSITIES["fixed"], "indexer.rope=false", seed=seed).eval()
    text = tokens(seed=seed) % 7
    with torch.no_grad():
        whole = hidden(model, text)
        cache = model.new_cache()
        pieces = [model(text[:, t : t + 1], cache=cache).hidden_BTD for t in range(LENGTH)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-9)


@few_cases
def test_decoding_with_documents(case):
    model = build_case(case).eval()
    text, cuts = tokens(), CUTS["chunks"]
    docs = torch.zeros(2, LENGTH, dtype=torch.long)
    docs[0, 37:], docs[1, 60:] = 37, 60
    with torch.no_grad():
        whole = hidden(model, text, docs)
        cache = model.new_cache()
        pieces = []
        for low, high in zip([0, *cuts], [*cuts, LENGTH]):
            pieces.append(model(text[:, low:high], docs[:, :high], cache=cache).hidden_BTD)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-9)


@every_mode
@pytest.mark.parametrize("gate", ["none", "dual"])
@pytest.mark.parametrize("objective", ["none", "kl"])
@pytest.mark.parametrize("documents", [False, True], ids=["one_doc", "docs"])
def test_a_budget_for_every_key_is_dense_attention(mode, gate, objective, documents):
    budget = ["sparsity=fixed", "sparsity.k=1000", "sparsity.window=8", "sparsity.sinks=4"]
    sparse = build(*MODES[mode], *budget, f"gate={gate}", *OBJECTIVES[objective])
    dense = build("attention=dense", f"gate={gate}", seed=1)
    shared = {n: p for n, p in sparse.state_dict().items() if n in dense.state_dict()}
    dense.load_state_dict(shared)
    docs = None
    if documents:
        docs = torch.zeros(2, LENGTH, dtype=torch.long)
        docs[0, 37:], docs[1, 60:] = 37, 60
    got, expected = hidden(sparse, tokens(), docs), hidden(dense, tokens(), docs)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    dense_grad = torch.autograd.grad(expected.sin().sum(), dense.embedding.weight)
    sparse_grad = torch.autograd.grad(got.sin().sum(), sparse.embedding.weight)
    torch.testing.assert_close(sparse_grad, dense_grad, rtol=0, atol=1e-9)


@every_mode
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_which_objectives_teach_the_indexer(mode, objective):
    model = build(*MODES[mode], *SPARSITIES["fixed"], "gate=dual", *OBJECTIVES[objective])
    found = gradients(model, tokens())
    for name, parameter in model.named_parameters():
        if "indexer" not in name:
            assert parameter.grad is not None and (parameter.grad != 0).any(), name
        elif objective == "none":
            assert name not in found
        elif "head_bias" not in name or objective == "bias":
            assert (found[name] != 0).any(), name


@every_mode
def test_the_kl_loss_moves_only_the_indexer(mode):
    model = build(*MODES[mode], *SPARSITIES["fixed"], "gate=dual", *OBJECTIVES["kl"])
    out = model(tokens())
    assert all(r.index_loss > 0 for r in out.reports)
    sum(r.index_loss for r in out.reports).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("indexer" in name), name
    assert all(r.index_loss is None for r in model.eval()(tokens()).reports)


@pytest.mark.parametrize("detach", [True, False])
def test_the_bias_objective_can_be_detached(detach):
    model = build(
        *MODES["tile"], *SPARSITIES["fixed"], "objective=bias", f"objective.detach={detach}"
    )
    inputs = []
    layer = list(model.blocks)[1].attention
    layer.indexer.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    hidden(model, tokens())
    assert inputs[0].requires_grad != detach


def test_a_dense_warm_up_attends_every_key():
    overrides = [*MODES["tile"], *SPARSITIES["fixed"], "gate=none"]
    model = build(*overrides, *OBJECTIVES["kl"], "objective.warmup_steps=5")
    dense = build("attention=dense", "gate=none", seed=1)
    state = model.state_dict()
    dense.load_state_dict({n: state[n] for n in dense.state_dict()})
    expected = hidden(dense, tokens())
    warm = model(tokens(), step=4)
    torch.testing.assert_close(warm.hidden_BTD, expected, rtol=0, atol=1e-10)
    assert all(r.index_loss > 0 for r in warm.reports)
    assert not torch.allclose(model(tokens(), step=5).hidden_BTD, expected)
    assert not torch.allclose(model.eval()(tokens(), step=4).hidden_BTD, expected)


@every_case
def test_activation_checkpointing_changes_nothing(case):
    model = build_case(case)
    text = tokens()
    loss, plain = loss_of(model, text), gradients(model, text)
    model.activation_checkpointing = True
    assert torch.equal(loss_of(model, text), loss)
    again = gradients(model, text)
    assert again.keys() == plain.keys()
    for name, value in plain.items():
        assert torch.equal(again[name], value), name


@every_case
def test_evaluation_is_the_training_forward(case):
    model = build_case(case)
    expected = hidden(model, tokens())
    assert torch.equal(hidden(model.eval(), tokens()), expected)
    with torch.no_grad():
        assert torch.equal(hidden(model, tokens()), expected)


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor any operation makes; fails from `limit` elements on."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.largest = limit, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                # An expanded view holds only its storage.
                held = min(leaf.numel(), leaf.untyped_storage().nbytes() // leaf.itemsize)
                self.largest = max(self.largest, held)
                assert held < self.limit, f"{func} made {tuple(leaf.shape)}"
        return out


def largest_tensor(length: int, *overrides: str) -> int:
    """Elements of the largest tensor in the forward and backward of one layer."""
    model = build(*overrides).float()
    layer = next(iter(model.blocks)).attention
    x = torch.randn(1, length, 32, requires_grad=True)
    with LargestTensor(length * length) as seen:
        rotary = model.rotary.cos_sin(torch.arange(length))
        out, report = layer(x, rotary, Sequence())
        loss = out.square().mean()
        if report.index_loss is not None:
            loss = loss + report.index_loss
        loss.backward()
    assert x.grad is not None
    return seen.largest


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("block_score", ["mean", "max"])
def test_no_tensor_is_quadratic_in_the_context(objective, block_score, monkeypatch):
    for module in (eager, index_score):
        monkeypatch.setitem(module._CHUNK, "cpu", 1 << 17)
    overrides = [
        "attention.mode=tile",
        "sparsity=fixed",
        "sparsity.k=256",
        "sparsity.window=64",
        "sparsity.sinks=64",
        "indexer.dim=8",
        f"indexer.block_score={block_score}",
        *OBJECTIVES[objective],
    ]
    short, long = (largest_tensor(n, *overrides) for n in (2048, 4096))
    assert long < 3 * short and long < 4096 * 4096 // 8


@pytest.mark.parametrize("mode", ["token", "block"])
def test_single_queries_hold_no_quadratic_tensor(mode, monkeypatch):
    for module in (eager, index_score):
        monkeypatch.setitem(module._CHUNK, "cpu", 1 << 16)
    overrides = [*MODES[mode], *SPARSITIES["fixed"], "indexer.dim=8", "objective=none"]
    short, long = (largest_tensor(n, *overrides) for n in (1024, 2048))
    assert long < 3 * short and long < 2048 * 2048 // 8
