"""Gradients by query gathering against one softmax over a T x S mask, and its lists."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_cases import make_selection

from gsa_kernels.sparse_attention import sparse_attention

pytest.importorskip("triton")

pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies bfloat16 matrices as if they were integers.
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
NAMES = ("dq", "dk", "dv")


@pytest.fixture
def gathering(monkeypatch):
    """Chunks and items of few queries; memory that was never written is NaN."""
    from gsa_kernels.sparse_attention import triton_config

    def use(rows: int = 32, longest: int = 60) -> None:
        launch = triton_config.GatherLaunch(rows, 4, 2, longest)
        monkeypatch.setattr(triton_config, "gathered_gradient", lambda *_: launch)
        monkeypatch.setattr(triton_config, "GATHER_BACKWARD_FROM", 0)

    def poisoned(make):
        def call(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    return use


def chosen(length, granularity=(16, 1), *, start=0, every=3, **kwargs):
    """A selection, of which every third query chooses nothing."""
    whole = make_selection(length, granularity, window=17, budget=90, **kwargs)
    blocks = whole.blocks_BHQN.clone()
    blocks[:, :, ::every] = -1
    docs = whole.doc_start_BS
    blocks = blocks[: 1 if docs is None else 2, :, start:]
    return replace(
        whole,
        blocks_BHQN=blocks.to(DEVICE).contiguous(),
        n_queries=length - start,
        q_start=start,
        doc_start_BS=None if docs is None else docs.to(DEVICE, torch.int32).contiguous(),
    )


def gradients(selection, tensors, scale, impl):
    """Of sin(out) + cos(lse)."""
    if impl == "reference":
        leaves = [x.detach().requires_grad_() for x in tensors]
        found = sparse_attention(*leaves, selection, scale=scale, need_lse=True, impl=impl)
        return torch.autograd.grad(found.out_BTHE.sin().sum() + found.lse_BTH.cos().sum(), leaves)
    from gsa_kernels.sparse_attention import triton_launch

    found = sparse_attention(*tensors, selection, scale=scale, need_lse=True, impl="reference")
    out, lse = found.out_BTHE.contiguous(), found.lse_BTH.float().transpose(1, 2).contiguous()
    docs = selection.doc_start_BS
    return triton_launch.backward(
        *tensors, out, lse, out.cos(), -lse.sin(), selection, None, docs, scale, False
    )[:3]


def check(selection, *, heads=4, kv_heads=2, width=32, dtype=torch.float32, scale=0.3):
    """Error <= 2 x that of the same formula in the same precision (+ rounding)."""
    g = torch.Generator().manual_seed(1)
    sizes = ((selection.n_queries, heads), *[(selection.n_keys, kv_heads)] * 2)
    batch = len(selection.blocks_BHQN)
    low = [torch.randn(batch, n, h, width, generator=g).to(DEVICE, dtype) for n, h in sizes]
    exact = gradients(selection, [x.double() for x in low], scale, "reference")
    reference = gradients(selection, low, scale, "reference")
    got = gradients(selection, low, scale, "triton")
    for name, value, other, mine in zip(NAMES, exact, reference, got, strict=True):
        assert mine.dtype == dtype
        error, allowed = ((x.double() - value).norm() for x in (mine, other))
        floor = 4 * torch.finfo(torch.float32).eps * value.norm()
        assert error <= 2 * allowed + floor + 1e-6, (name, float(error), float(allowed))


@pytest.mark.parametrize(
    ("start", "documents", "heads", "kv_heads", "width", "scale"),
    [(0, False, 4, 2, 32, 0.3), (37, True, 4, 1, 16, -0.7), (5, True, 6, 2, 24, 0.3),
     (0, False, 2, 2, 32, 0.0)],
)  # fmt: skip
def test_gradients_are_those_of_the_reference(
    gathering, start, documents, heads, kv_heads, width, scale
):
    gathering()
    # Without sinks a block may begin before its document.
    sinks = 0 if documents else 5
    groups = 2 if kv_heads == 2 else 1
    selection = chosen(90, start=start, documents=documents, heads=groups, sinks=sinks)
    assert (selection.blocks_BHQN >= 0).sum() > 30
    check(selection, heads=heads, kv_heads=kv_heads, width=width, scale=scale)


@pytest.mark.parametrize("documents", [False, True])
def test_half_precision_and_long_blocks(gathering, documents):
    gathering(rows=64)
    selection = chosen(200, (64, 1), documents=documents, sinks=0)
    assert (selection.blocks_BHQN >= 0).sum() > 70
    check(selection, heads=8, kv_heads=1, dtype=HALF)


def turned(lists):
    """The same lists in reverse order, items included."""
    used = (lists.entries >= 0).flatten(2).sum(-1, dtype=torch.int32)[..., None]
    at = (used - 1 - torch.arange(lists.queries.shape[2], device=DEVICE)).clamp_min(0)
    entries = used[..., None] - 1 - lists.entries
    items = lists.items.clone()
    items[..., 1], items[..., 2] = used - lists.items[..., 2], used - lists.items[..., 1]
    return replace(
        lists,
        queries=lists.queries.gather(2, at.long()),
        entries=entries.masked_fill(lists.entries < 0, -1),
        items=items,
    )


def test_lists_are_in_any_order(gathering, monkeypatch):
    """Queries take their places in the lists of a GPU as they come."""
    from gsa_kernels.sparse_attention import gather_backward

    gathering()
    listed = gather_backward.gather_lists
    monkeypatch.setattr(gather_backward, "gather_lists", lambda *args: turned(listed(*args)))
    check(chosen(90, heads=2, sinks=5))


def test_nothing_chosen(gathering):
    gathering()
    selection = chosen(50, every=1)
    assert selection.blocks_BHQN.shape[3] and (selection.blocks_BHQN < 0).all()
    check(selection)


def test_who_gathers(monkeypatch):
    from gsa_kernels.sparse_attention import gather_backward, triton_config

    monkeypatch.setattr(triton_config, "GATHER_BACKWARD_FROM", 100)
    assert gather_backward.gathers(chosen(100))
    nothing = chosen(100).blocks_BHQN[..., :0]
    assert not gather_backward.gathers(replace(chosen(100), blocks_BHQN=nothing))
    for length, granularity in ((99, (16, 1)), (100, (1, 1)), (100, (16, 16))):
        assert not gather_backward.gathers(make_selection(length, granularity))


@pytest.mark.parametrize("queries", [16384, 131072, 1 << 20])
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 4), (32, 32), (16, 1)])
def test_chunks_take_bounded_memory(queries, heads, kv_heads):
    from gsa_kernels.sparse_attention.gather_backward import chunk_of

    size = chunk_of(queries, heads, kv_heads, 128, 29)
    assert 0 < size <= queries and -queries % size < queries / size  # equal chunks
    rows = size * 29 * heads // kv_heads
    assert rows <= queries * heads and rows * 128 < 1 << 31
    assert 2.5 * rows > min(queries * heads, 1 << 23)


def test_items_hold_every_choice_once():
    from gsa_kernels.sparse_attention.gather_lists import gather_lists

    selection = chosen(130, heads=2, start=7, documents=True, sinks=0)
    lists = gather_lists(selection, 48, 5)
    assert (lists.size, lists.chunks) == (48, 3)
    found, blocks = set(), selection.blocks_BHQN.tolist()
    lines = (x.flatten(0, 1).tolist() for x in (lists.queries, lists.entries, lists.items))
    for line, (queries, entries, items) in enumerate(zip(*lines, strict=True)):
        b, chunk, h = line // 6, line // 2 % 3, line % 2
        lengths = [last - first for _, first, last, _ in items]
        assert lengths == sorted(lengths, reverse=True) and lengths[0] <= 5
        assert lengths[-1] >= 0
        for block, first, last, _ in items:
            for place in range(first, last):
                t = queries[place]
                n = blocks[b][h][chunk * 48 + t].index(block)
                assert entries[t][n] == place
                found.add((b, h, chunk * 48 + t, n))
        assert sum(x >= 0 for row in entries for x in row) == sum(lengths)
    assert len(found) == int((selection.blocks_BHQN >= 0).sum()) > 100


def test_the_command(monkeypatch, tmp_path, capsys):
    """A captured selection; gradients are those of the union tiles."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "experiments" / "speed"))
    blocks = make_selection(80, (16, 1), window=32, sinks=16, budget=96).blocks_BHQN
    assert (blocks[0] >= 0).sum() > 10
    np.savez(tmp_path / "lists.npz", blocks=blocks[0, 0].numpy(force=True).astype(np.int16))
    arguments = ["--seq-len", "80", "--k", "96", "--heads", "2", "--kv-heads", "1", "--key-block",
                 "16", "--head-dim", "16", "--variants", "32 rows, 5 stages",
                 "--lists", tmp_path / "lists.npz", "--out", tmp_path / "out.json"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["block_backward.py", *map(str, arguments)])
    study = importlib.import_module("block_backward")
    try:
        study.main()
    finally:
        sys.modules.pop("block_backward")
    (row,) = json.loads((tmp_path / "out.json").read_text())["records"]
    assert "error" not in row and row["source"] == "lists.npz"
    assert all(0 <= x < 1e-2 for x in row["difference"].values()) and row["whole_ms"] > 0
    assert "union tiles" in capsys.readouterr().out
