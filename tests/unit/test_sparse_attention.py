"""Sparse attention: the chunked implementation against one softmax over a T x S mask."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import GRANULARITIES, granularity_id, make_selection

from gsa_kernels.sparse_attention import eager
from gsa_kernels.sparse_attention.api import choose, sparse_attention

granularities = pytest.mark.parametrize("granularity", GRANULARITIES, ids=granularity_id)
documents = pytest.mark.parametrize("documents", [False, True], ids=["one_doc", "docs"])
NAMES = ("out", "lse", "mass", "dq", "dk", "dv", "dbias")


def inputs(selection, heads=4, kv_heads=2, width=16, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    batch = selection.blocks_BHQN.shape[0]

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return (
        draw(batch, selection.n_queries, heads, width),
        draw(batch, selection.n_keys, kv_heads, width),
        draw(batch, selection.n_keys, kv_heads, width),
        draw(*selection.blocks_BHQN.shape),
    )


def run(selection, tensors, impl="eager", lse=True, with_bias=True, scale=None):
    """Outputs and gradients by name; the loss reads out and, if asked for, lse."""
    q, k, v, bias = (x.detach().clone().requires_grad_() for x in tensors)
    result = sparse_attention(
        q,
        k,
        v,
        selection,
        bias_BHQN=bias if with_bias else None,
        scale=scale,
        need_lse=lse,
        need_mass=True,
        impl=impl,
    )
    loss = result.out_BTHE.sin().sum()
    if lse:
        loss = loss + result.lse_BTH.cos().sum()
    leaves = (q, k, v, bias) if with_bias else (q, k, v)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    values = [result.out_BTHE, result.lse_BTH, result.mass_BHQN, *grads]
    return {n: x.detach() for n, x in zip(NAMES, values) if x is not None}


def assert_same(got, expected, atol=1e-10):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.isfinite(got[name]).all(), name
        torch.testing.assert_close(
            got[name], value, rtol=1e-9, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@granularities
@pytest.mark.parametrize("length", [1, 63, 100])
@documents
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "kv"])
def test_eager_is_the_reference(granularity, length, documents, shared):
    selection = make_selection(length, granularity, heads=1 if shared else 2, documents=documents)
    tensors = inputs(selection)
    assert_same(run(selection, tensors), run(selection, tensors, "reference"))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("granularity", [(16, 1), (4, 16)], ids=granularity_id)
def test_grouped_heads(granularity, heads, kv_heads):
    for choices in {1, kv_heads}:
        selection = make_selection(100, granularity, heads=choices)
        tensors = inputs(selection, heads, kv_heads)
        assert_same(run(selection, tensors), run(selection, tensors, "reference"))


@pytest.mark.parametrize("lse", [True, False], ids=["lse", "no_lse"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("granularity", [(1, 1), (16, 1), (4, 16)], ids=granularity_id)
def test_options(granularity, lse, with_bias):
    selection = make_selection(100, granularity)
    tensors = inputs(selection)
    kwargs = dict(lse=lse, with_bias=with_bias, scale=0.7)
    assert_same(run(selection, tensors, **kwargs), run(selection, tensors, "reference", **kwargs))


@granularities
@documents
def test_one_tile_at_a_time(granularity, documents, monkeypatch):
    selection = make_selection(100, granularity, documents=documents)
    tensors = inputs(selection)
    whole = run(selection, tensors)
    monkeypatch.setitem(eager._CHUNK, "cpu", 1)
    assert_same(run(selection, tensors), whole)


@granularities
@pytest.mark.parametrize("start", [0, 5, 37, 99])
@documents
def test_last_queries_only(granularity, start, documents):
    whole = make_selection(100, granularity, documents=documents)
    tensors = inputs(whole)
    blocks = whole.blocks_BHQN[:, :, start // granularity[1] :]
    part = type(whole)(whole.spec, blocks, 100 - start, 100, start, whole.doc_start_BS)
    q, k, v, bias = tensors
    cut = (q[:, start:], k, v, bias[:, :, start // granularity[1] :])
    got = run(part, cut)
    assert_same(got, run(part, cut, "reference"))
    torch.testing.assert_close(got["out"], run(whole, tensors)["out"][:, start:])


@pytest.mark.parametrize("granularity", [(1, 1), (16, 1), (4, 16), (16, 16)], ids=granularity_id)
def test_numerical_gradients(granularity):
    selection = make_selection(21, granularity, window=2, sinks=1, budget=12, documents=True)
    tensors = [x.requires_grad_() for x in inputs(selection, 2, 1, 3)]

    def call(q, k, v, bias):
        result = sparse_attention(q, k, v, selection, bias_BHQN=bias, need_lse=True, impl="eager")
        return result.out_BTHE, result.lse_BTH

    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("granularity", [(1, 1), (16, 1), (16, 16), (8, 32)], ids=granularity_id)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision(granularity, dtype):
    selection = make_selection(130, granularity)
    low = inputs(selection, dtype=dtype)
    exact = run(selection, [x.double() for x in low], "reference", lse=False)
    reference = run(selection, low, "reference", lse=False)
    got = run(selection, low, lse=False)
    assert got["out"].dtype == dtype and got["dk"].dtype == dtype
    for name, value in exact.items():
        allowed = (reference[name].double() - value).norm()
        error = (got[name].double() - value).norm()
        # Both are sums in float32: the reference may be lucky by a rounding of its result.
        assert error <= 2 * allowed + torch.finfo(torch.float32).eps * value.norm(), name


@granularities
@documents
def test_no_result_depends_on_uninitialised_memory(granularity, documents, monkeypatch):
    selection = make_selection(100, granularity, documents=documents)
    tensors = inputs(selection)
    clean = run(selection, tensors)

    def poisoned(make):
        def call(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    dirty = run(selection, tensors)
    for name, value in clean.items():
        assert torch.equal(dirty[name], value), name


def test_masses_and_gradients_stay_inside_the_selection():
    selection = make_selection(100, (4, 16))
    values = run(selection, inputs(selection))
    empty = selection.blocks_BHQN < 0
    assert empty.any()
    assert (values["mass"][empty] == 0).all() and (values["dbias"][empty] == 0).all()
    assert (values["mass"].sum(-1) <= 1).all()


@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_the_mass_carries_no_gradient(impl):
    selection = make_selection(63, (4, 16))
    q, k, v, _ = inputs(selection)
    result = sparse_attention(q.requires_grad_(), k, v, selection, need_mass=True, impl=impl)
    assert result.out_BTHE.requires_grad and not result.mass_BHQN.requires_grad
    assert result.lse_BTH is None


def test_shapes_that_do_not_fit_are_refused():
    selection = make_selection(63, (4, 16), heads=2)
    q, k, v, bias = inputs(selection)
    cases = [
        ((q[:, :, :3], k, v), {}, "not a multiple"),
        ((q, k, v[:, :-1]), {}, "differ"),
        ((q, k[..., :8], v[..., :8]), {}, "differ"),
        ((q[:, 1:], k, v), {}, "63 queries"),
        ((q, k[:, 1:], v[:, 1:]), {}, "63 keys"),
        ((q, k[:, :, :1], v[:, :, :1]), {}, "1 or 1 heads, not 2"),
        ((q[:1], k, v), {}, "a batch of 2, not 1"),
        ((q, k[:1], v[:1]), {}, "a batch of 2, not 2 .queries. and 1"),
        ((q, k, v), {"bias_BHQN": bias[..., 1:]}, "one entry for each slot"),
    ]
    for args, kwargs, message in cases:
        with pytest.raises(ValueError, match=message):
            sparse_attention(*args, selection, **kwargs)


def test_an_implementation_that_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    selection = make_selection(63, (4, 16))
    q, k, v, _ = inputs(selection)
    text = r"impl=triton cannot run: .*[Tt]riton.*usable here: eager"
    with pytest.raises(ValueError, match=text):
        sparse_attention(q, k, v, selection, impl="triton")
    with pytest.raises(ValueError, match="'nonsense' is not one of auto, eager, reference"):
        sparse_attention(q, k, v, selection, impl="nonsense")
    name, why = choose("auto", torch.device("cpu"))
    assert name == "eager" and "because" in why
    assert choose("reference", torch.device("cpu")) == ("reference", "asked for")


def test_autocast_does_not_lower_the_precision():
    selection = make_selection(100, (4, 16))
    low = inputs(selection, dtype=torch.bfloat16)
    plain = run(selection, low)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = run(selection, low)
    for name, value in plain.items():
        assert torch.equal(again[name], value), name
