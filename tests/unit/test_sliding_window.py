"""The sliding window against one softmax, and against the same keys as a Selection."""

from __future__ import annotations

import pytest
import torch
from attention_cases import DIMS, assert_same, draw, masked, varlen_oracle
from kernel_cases import make_documents

from gsa_kernels.sparse_attention.api import sparse_attention
from gsa_platform.contracts import Sequence
from gsa_platform.errors import UserError
from gsa_platform.validate import validate
from gsa_plugins.attention import sliding_window, varlen
from gsa_plugins.attention.probes import window_selection
from gsa_plugins.attention.sliding_window import SlidingWindowAttention, chunked
from gsa_plugins.configs import SlidingWindowConfig

WINDOWS = [(1, 0), (7, 0), (7, 3), (40, 20), (200, 0), (1, 5)]
windows = pytest.mark.parametrize(("window", "sinks"), WINDOWS)
documents = pytest.mark.parametrize("documents", [False, True], ids=["one_doc", "docs"])


def mask_of(length, window, sinks, docs=None):
    """The definition, one query at a time."""
    batch = 2 if docs is not None else 1
    mask = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    for b in range(batch):
        for t in range(length):
            first = 0 if docs is None else int(docs[b, t])
            keys = set(range(max(first, t - window + 1), t + 1))
            keys |= set(range(first, min(first + sinks, t + 1)))
            mask[b, 0, t, list(keys)] = True
    return mask


def build(window, sinks=0, impl="auto"):
    return SlidingWindowAttention(SlidingWindowConfig(window=window, sinks=sinks, impl=impl), DIMS)


def attend(layer, seq):
    return lambda q, k, v: layer(q, k, v, None, seq).out_BTHE


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 16 rows, so that small cases have many."""
    monkeypatch.setattr(sliding_window, "_ROWS", 16)


@windows
@pytest.mark.parametrize("length", [1, 63, 100])
@documents
def test_it_is_the_softmax_over_the_window(window, sinks, length, documents, device):
    docs = make_documents(length) if documents else None
    seq = Sequence(0, None if docs is None else docs.to(device))
    oracle, tensors = masked(mask_of(length, window, sinks, docs)), draw(length)
    kinds = [torch.float64] if device == "cpu" else [torch.float32, torch.bfloat16]
    for dtype in kinds:
        assert_same(attend(build(window, sinks), seq), oracle, tensors, device, dtype)


@pytest.mark.parametrize("rows", [64, 512])
@documents
def test_the_size_of_a_chunk_changes_nothing(rows, documents, monkeypatch):
    monkeypatch.setattr(sliding_window, "_ROWS", rows)
    docs = make_documents(200) if documents else None
    oracle = masked(mask_of(200, 40, 5, docs))
    assert_same(attend(build(40, 5), Sequence(0, docs)), oracle, draw(200))


@windows
@pytest.mark.parametrize("start", [1, 16, 37, 99])
@documents
def test_queries_that_continue_a_cache(window, sinks, start, documents, device):
    docs = make_documents(100) if documents else None
    seq = Sequence(start, None if docs is None else docs.to(device))
    oracle = masked(mask_of(100, window, sinks, docs)[:, :, start:])
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    tensors = draw(100 - start, 100)
    assert_same(attend(build(window, sinks), seq), oracle, tensors, device, dtype)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (8, 1)])
def test_grouped_heads(heads, kv_heads):
    tensors = draw(63, heads=heads, kv_heads=kv_heads)
    assert_same(attend(build(7, 3), Sequence()), masked(mask_of(63, 7, 3)), tensors)


@windows
@documents
def test_it_is_a_selection_of_single_keys(window, sinks, documents):
    docs = make_documents(63) if documents else None
    selection = window_selection(window, sinks, Sequence(0, docs), 2, 63)
    mask = mask_of(63, window, sinks, docs)
    assert torch.equal(selection.to_dense_mask(), mask.expand(2, -1, -1, -1))
    q, k, v = draw(63)
    expected = sparse_attention(q, k, v, selection, impl="reference").out_BTHE
    got = build(window, sinks)(q, k, v, None, Sequence(0, docs)).out_BTHE
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@documents
def test_later_tokens_change_nothing(documents):
    seq = Sequence(0, make_documents(100) if documents else None)
    q, k, v = draw(100)
    layer = build(9, 2)
    before = layer(q, k, v, None, seq).out_BTHE
    for t in (1, 17, 48, 99):
        others = [x.clone() for x in (q, k, v)]
        for x in others:
            x[:, t:] += 1
        after = layer(*others, None, seq).out_BTHE
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t:], before[:, t:])


@pytest.mark.parametrize("start", [0, 30])
@documents
def test_arguments_of_the_varlen_kernel(start, documents, monkeypatch):
    windows_seen = []

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, enable_gqa):
        windows_seen.append(window_size)
        return varlen_oracle(window_size[0])(q, k, v, cu_q, cu_k, max_q, max_k)

    monkeypatch.setattr(varlen, "operator", lambda: kernel)
    monkeypatch.setattr(varlen, "usable", lambda q: True)
    docs = make_documents(100) if documents else None
    oracle = masked(mask_of(100, 7, 0, docs)[:, :, start:])
    layer = build(7, impl="flash")
    assert_same(attend(layer, Sequence(start, docs)), oracle, draw(100 - start, 100))
    assert set(windows_seen) == {(6, 0)}


def test_cost_and_memory_are_linear(monkeypatch):
    calls = []
    call = sliding_window.sdpa.call

    def counted(q, k, v, **options):
        calls.append((q.shape[1], k.shape[1]))
        return call(q, k, v, **options)

    monkeypatch.setattr(sliding_window.sdpa, "call", counted)
    q, k, v = (x.float() for x in draw(4096, batch=1, heads=1, kv_heads=1, width=8))
    out = chunked(q, k.requires_grad_(), v, Sequence(), 40, 4)
    assert max(m for _, m in calls) <= 40 + 2 * 16 + 4 and len(calls) == 4096 // 16
    masks = {id(t) for t in _saved(out) if t.dtype == torch.bool}
    assert len(masks) < 8  # chunks share their masks


def _saved(out):
    """Tensors that the graph of `out` keeps."""
    seen, todo, found = set(), [out.grad_fn], []
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for name in dir(node):
            if name.startswith("_saved_"):
                value = getattr(node, name)
                found += [value] if isinstance(value, torch.Tensor) else []
        todo += [n for n, _ in node.next_functions]
    return found


def test_mean_keys():
    assert build(4, 2).mean_keys(100) == build(6).mean_keys(100)
    expected = mask_of(100, 6, 0).sum(-1).float().mean()
    assert build(6).mean_keys(100) == pytest.approx(float(expected))
    assert build(200).mean_keys(100) == pytest.approx(50.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "attention.window=0 must be at least 1"),
        ({"sinks": -1}, "attention.sinks=-1 at least 0"),
        ({"impl": "flush"}, "'flush' is not one of auto, chunked, flash"),
        ({"impl": "flash", "sinks": 1}, "knows no sinks"),
    ],
)
def test_settings_that_do_not_exist(settings, message):
    with pytest.raises(ValueError, match=message):
        SlidingWindowAttention(SlidingWindowConfig(**settings), DIMS)


def test_flash_is_never_replaced():
    with pytest.raises(ValueError, match=r"attention\.impl=flash needs CUDA"):
        build(7, impl="flash")(*draw(8), None, Sequence())


def test_it_says_what_runs():
    assert build(7, 3).describe("cpu") == "sliding_window: window 7, sinks 3; impl auto (chunked)"
    assert "flash in half precision" in build(7).describe("cuda")
    assert build(7, 3).describe("cuda").endswith("(chunked)")


@pytest.mark.parametrize(
    ("typed", "part"),
    [
        ("attention.window=0", "Type attention.window=1"),
        ("attention.sinks=-1", "Type attention.sinks=0"),
        ("attention.impl=flush", "Did you mean 'flash'"),
        ("attention.impl=flash", "Type attention.impl=chunked"),
    ],
)
def test_refusals_before_training(typed, part):
    from gsa_platform import compose  # Hydra, which a GPU machine may lack

    cfg = compose.load(["experiment=smoke", "attention=sliding_window", typed])
    with pytest.raises(UserError, match=part):
        validate(cfg)
