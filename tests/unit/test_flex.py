"""FlexAttention over a Selection equals the reference of sparse attention."""

from __future__ import annotations

import pytest
import torch
from attention_cases import DIMS, assert_same, draw
from kernel_cases import make_selection

from gsa_kernels.sparse_attention.api import sparse_attention
from gsa_platform.contracts import LayerDims, Sequence
from gsa_platform.errors import UserError
from gsa_platform.validate import validate
from gsa_plugins.attention.flex import FlexSelectedAttention, attend_compiled
from gsa_plugins.attention.flex_eager import attend_mask
from gsa_plugins.configs import FlexConfig
from gsa_plugins.dense import dense_attention

GRANULARITIES = [(16, 1), (64, 1), (16, 16), (1, 16), (4, 16), (8, 32), (64, 64), (128, 64)]
granularities = pytest.mark.parametrize(
    "granularity", GRANULARITIES, ids=lambda g: f"C{g[0]}R{g[1]}"
)
documents = pytest.mark.parametrize("documents", [False, True], ids=["one_doc", "docs"])


def build(dims=DIMS, **settings):
    return FlexSelectedAttention(FlexConfig(**settings), dims)


def moved(selection, device):
    docs = selection.doc_start_BS
    return type(selection)(
        selection.spec,
        selection.blocks_BHQN.to(device),
        selection.n_queries,
        selection.n_keys,
        selection.q_start,
        None if docs is None else docs.to(device),
    )


def check(selection, tensors, device="cpu", block=128, dtype=torch.float64):
    """Eager on a CPU, compiled on a GPU."""
    here = moved(selection, device)
    layer = build(block=block)

    def oracle(q, k, v):
        chosen = selection if q.device.type == "cpu" else here
        return sparse_attention(q, k, v, chosen, impl="reference").out_BTHE

    assert_same(
        lambda q, k, v: layer(q, k, v, here, Sequence(here.q_start)).out_BTHE,
        oracle,
        tensors,
        device,
        dtype,
    )


# Compiled anew each, so few: granularity, length, selection heads, documents, start, cell, dtype.
GPU_CASES = [
    ((64, 64), 300, 1, False, 0, 128, torch.bfloat16),
    ((64, 64), 300, 2, True, 0, 128, torch.bfloat16),
    ((64, 64), 300, 1, True, 0, 128, torch.float32),
    ((16, 1), 300, 1, False, 0, 128, torch.bfloat16),
    ((4, 16), 63, 2, True, 0, 128, torch.bfloat16),
    ((64, 64), 1, 1, False, 0, 128, torch.bfloat16),
    ((128, 64), 300, 1, False, 0, 256, torch.bfloat16),
    ((64, 64), 300, 1, True, 0, 64, torch.bfloat16),
    ((16, 16), 100, 1, True, 37, 128, torch.bfloat16),
    ((16, 16), 100, 1, False, 99, 128, torch.bfloat16),
]


@pytest.mark.gpu
@pytest.mark.parametrize("width", [16, 128])
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda c: "-".join(map(str, c)).replace(" ", ""))
def test_the_compiled_kernel_on_a_gpu(case, width):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    granularity, length, heads, documents, start, block, dtype = case
    torch.compiler.reset()
    whole = make_selection(
        length, granularity, heads=heads, documents=documents, budget=160, window=20
    )
    selection = whole.rows(start, length)
    check(selection, draw(length - start, length, width=width), "cuda", block, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(6, 2, 16), (8, 1, 16), (4, 4, 8)])
def test_heads_on_a_gpu(heads, kv_heads, width):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.compiler.reset()
    tensors = draw(100, heads=heads, kv_heads=kv_heads, width=width)
    check(make_selection(100, (16, 16)), tensors, "cuda", dtype=torch.bfloat16)


@granularities
@pytest.mark.parametrize("length", [1, 63, 100, 300])
@pytest.mark.parametrize("heads", [1, 2], ids=["shared", "kv"])
@documents
def test_it_is_the_reference(granularity, length, heads, documents):
    selection = make_selection(
        length, granularity, heads=heads, documents=documents, budget=160, window=20
    )
    check(selection, draw(length))


@pytest.mark.parametrize("block", [64, 256])
@documents
def test_the_size_of_a_cell_changes_nothing(block, documents):
    selection = make_selection(300, (64, 64), documents=documents, budget=200)
    check(selection, draw(300), block=block)


@pytest.mark.parametrize("granularity", [(16, 1), (4, 16), (64, 64)])
@pytest.mark.parametrize("start", [1, 16, 37, 99])
@documents
def test_queries_that_continue_a_cache(granularity, start, documents):
    whole = make_selection(100, granularity, documents=documents, budget=80)
    check(whole.rows(start, 100), draw(100 - start, 100))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (8, 1)])
def test_grouped_heads(heads, kv_heads):
    for choices in {1, kv_heads}:
        selection = make_selection(100, (16, 16), heads=choices)
        check(selection, draw(100, heads=heads, kv_heads=kv_heads))


def test_narrow_heads():
    check(make_selection(100, (16, 16)), draw(100, width=8))


@pytest.mark.slow
def test_the_compiled_kernel_on_a_cpu():
    # Forward only; the same mask and rule as on a GPU, through the compiler.
    for length, start, heads in ((100, 0, 2), (100, 37, 1)):
        selection = make_selection(length, (16, 16), heads=heads, documents=True)
        selection = selection.rows(start, length)
        q, k, v = (x.float().transpose(1, 2) for x in draw(length - start, length))
        mask = selection.to_block_mask(64, heads=4)
        with torch.no_grad():
            got = attend_compiled(q, k, v, mask, 0.3)
            expected = attend_mask(q, k, v, mask, 0.3)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@documents
def test_later_tokens_change_nothing(documents, device):
    selection = moved(make_selection(100, (16, 16), documents=documents), device)
    q, k, v = (x.float().to(device) for x in draw(100))
    layer = build()
    with torch.no_grad():
        before = layer(q, k, v, selection, Sequence()).out_BTHE
        for t in (1, 17, 48, 99):
            others = [x.clone() for x in (q, k, v)]
            for x in others:
                x[:, t:] += 1
            after = layer(*others, selection, Sequence()).out_BTHE
            assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.equal(after[:, t:], before[:, t:])


def test_eager_memory_is_linear():
    selection = make_selection(1024, (64, 64), budget=200)
    q, k, v = (x.float().requires_grad_() for x in draw(1024, heads=2, kv_heads=1))
    held = []

    def pack(x):
        held.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        layer = build()
        layer(q, k, v, selection, Sequence()).out_BTHE.sum().backward()
    assert max(held) < 2 * 1024 * 1024 // 4


def test_autocast_changes_nothing():
    selection = make_selection(100, (16, 16))
    q, k, v = (x.bfloat16().requires_grad_() for x in draw(100))
    layer = build()
    outs = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = layer(q, k, v, selection, Sequence()).out_BTHE
        outs.append([out, *torch.autograd.grad(out.float().sin().sum(), (q, k, v))])
    for plain, cast in zip(*outs):
        assert torch.equal(plain, cast)


def test_without_a_selection_it_is_dense():
    q, k, v = draw(63)
    got = build()(q, k, v, None, Sequence()).out_BTHE
    assert torch.equal(got, dense_attention(q, k, v, Sequence()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "token"}, "single keys is T x S; choose block or tile"),
        ({"impl": "triton"}, "'triton' is not one of auto, compiled, eager"),
        ({"block": 32}, "32 is not one of 64, 128, 256"),
        ({"mode": "tiles"}, "choose one of token, block, tile"),
    ],
)
def test_settings_that_do_not_exist(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_the_compiled_kernel_is_never_replaced():
    selection = make_selection(63, (16, 16))
    q, k, v = draw(63)
    layer = build(impl="compiled")
    with pytest.raises(ValueError, match="no backward on a CPU; choose eager or auto"):
        layer(q.requires_grad_(), k, v, selection, Sequence())
    with pytest.raises(ValueError, match="no backward on a CPU"):
        layer.describe("cpu")


def test_a_bias_is_refused():
    selection = make_selection(63, (16, 16))
    with pytest.raises(ValueError, match="adds no bias"):
        build()(*draw(63), selection, Sequence(), bias=torch.zeros(1))


def test_it_says_what_runs():
    assert "impl eager (FlexAttention has no CPU backward)" in build().describe("cpu")
    assert build().describe("cuda").endswith("cells of 128 x 128; impl compiled (FlexAttention)")
    assert build(impl="eager").describe("cuda").endswith("impl eager (asked for)")


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        (["attention.mode=token"], ["attention.mode=token", "attention.mode=block or tile"]),
        (["attention.impl=compiled"], ["no backward on a CPU", "attention.impl=eager or auto"]),
        (["attention.impl=eagre"], ["Did you mean 'eager'"]),
        (["attention.block=32"], ["attention.block=64, 128 or 256"]),
        (["objective=kl"], ["objective=kl", "attention=flex", "objective.selected=false"]),
        (["objective=bias"], ["objective=bias", "attention=flex", "attention=gsa"]),
    ],
)
def test_refusals_before_training(typed, parts):
    base = ["experiment=smoke", "attention=flex", "objective=none"]
    from gsa_platform import compose  # Hydra, which a GPU machine may lack

    cfg = compose.load([*base, *typed])
    with pytest.raises(UserError) as caught:
        validate(cfg)
    for part in parts:
        assert part in str(caught.value)


def test_mass_that_is_asked_for_must_come():
    from gsa_platform.model.attention_layer import AttentionLayer, Components
    from gsa_plugins.configs import FixedBudgetConfig, GatedLightningConfig, KlObjectiveConfig
    from gsa_plugins.indexer import GatedLightningIndexer
    from gsa_plugins.objective import KlObjective
    from gsa_plugins.sparsity import FixedBudget

    dims = LayerDims(32, 4, 2, 8, 100)
    parts = Components(
        build(dims, key_block=16, query_tile=16),
        GatedLightningIndexer(GatedLightningConfig(heads=2, dim=8), dims),
        FixedBudget(FixedBudgetConfig(k=64, window=16, sinks=0), dims),
        None,
        KlObjective(KlObjectiveConfig(), dims),
    )
    layer = AttentionLayer(dims, parts, qk_norm=True)
    rotary = torch.ones(100, 4), torch.zeros(100, 4)
    with pytest.raises(ValueError, match="returned no mass, which KlObjective asked for"):
        layer(torch.randn(1, 100, 32), rotary, Sequence())
