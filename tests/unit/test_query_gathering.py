"""The query-gathering study: attention by key block equals the reference, and its command runs."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_cases import make_documents

from gsa_kernels.selection import Selection, SelectionSpec
from gsa_kernels.sparse_attention import sparse_attention

pytest.importorskip("triton")

pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STUDY = Path(__file__).parents[2] / "experiments" / "speed"
NAMES = ("query_gathering_kernels", "query_gathering", "paired_groups")
# Triton's interpreter multiplies bfloat16 matrices as if they were integers.
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDY))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield [importlib.import_module(name) for name in NAMES]
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def kernels(study):
    return study[0]


def drawn(
    length, *, c=16, heads=1, slots=4, documents=False, start=0, share=0.3, empty=0.2, seed=0
):
    """Random choices of the last queries from `start`. Neighbours agree on a `share` of the blocks
    that they like, so that unions hold blocks of few and of many; some rows choose nothing."""
    g = torch.Generator().manual_seed(seed)
    # Without sinks a choice may begin before its document.
    spec = SelectionSpec(c, 1, window=17, sinks=0 if documents else 5, heads=heads)
    docs = make_documents(length) if documents else None
    layout = Selection(spec, torch.full((2, heads, length, 1), -1), length, length, 0, docs).layout
    may = layout.candidates(slice(None), layout.n_blocks).expand(2, -1, -1)[:, None]
    score = torch.rand(2, heads, length, layout.n_blocks, generator=g)
    liked = torch.rand(2, heads, length, layout.n_blocks, generator=g) < share
    score = score + liked * torch.arange(layout.n_blocks) % 7
    score = score.masked_fill(~may, -1)
    score[torch.rand(2, heads, length, generator=g) < empty] = -1
    width = min(slots, layout.n_blocks)
    best = score.topk(width, -1)
    far = layout.n_blocks
    chosen = best.indices.masked_fill(best.values < 0, far).sort(-1).values
    chosen = torch.nn.functional.pad(chosen, (0, slots - width), value=far)
    blocks = chosen.masked_fill(chosen == far, -1).to(torch.int32)[:, :, start:]
    return Selection(spec, blocks, length - start, length, start, docs)


def check(kernels, selection, *, heads=4, kv_heads=2, width=32, dtype=torch.float32,
          scale=None, **tuning):  # fmt: skip
    """Error of out and lse <= 2 x that of the reference in the same precision (+ rounding)."""
    g = torch.Generator().manual_seed(1)

    def draw(length, n):
        x = torch.randn(2, length, n, width, generator=g)
        return x.to(DEVICE, dtype)

    docs = selection.doc_start_BS
    selection = replace(
        selection,
        blocks_BHQN=selection.blocks_BHQN.to(DEVICE),
        doc_start_BS=None if docs is None else docs.to(DEVICE),
    )
    n_keys = selection.n_keys
    low = draw(selection.n_queries, heads), draw(n_keys, kv_heads), draw(n_keys, kv_heads)

    def reference(tensors):
        found = sparse_attention(*tensors, selection, need_lse=True, impl="reference", scale=scale)
        return found.out_BTHE.double(), found.lse_BTH.double()

    exact, allowed = reference([x.double() for x in low]), reference(low)
    chosen = kernels.Tuning(**{"chunk": 64, "longest": 24, "rows": 32, "merged": 64} | tuning)
    got = kernels.attend(*low, selection, chosen, scale)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    for name, value, other, mine in zip(("out", "lse"), exact, allowed, got):
        error, limit = ((x.double() - value).norm() for x in (mine, other))
        floor = 4 * torch.finfo(torch.float32).eps * value.norm()
        assert error <= 2 * limit + floor + 1e-6, (name, float(error), float(limit))


documents = pytest.mark.parametrize("documents", [False, True], ids=["one_doc", "docs"])


@documents
@pytest.mark.parametrize(
    ("length", "united"), [(1, 17), (1, 6), (63, 17), (63, 6), (100, 17), (200, 6)]
)
def test_it_is_the_reference(kernels, length, united, documents):
    heads = 1 + length % 2
    selection = drawn(length, documents=documents, heads=heads)
    check(kernels, selection, united=united)


@pytest.mark.parametrize(("heads", "kv_heads", "together"), [(4, 1, 1), (2, 2, 0), (6, 2, 1)])
@pytest.mark.parametrize("width", [24, 64])
def test_heads_and_widths(kernels, heads, kv_heads, together, width):
    for choices in {1, kv_heads}:
        selection = drawn(60, heads=choices)
        check(kernels, selection, heads=heads, kv_heads=kv_heads, width=width, together=together)


@documents
@pytest.mark.parametrize("c", [16, 64])
def test_half_precision(kernels, c, documents):
    selection = drawn(150 if c == 16 else 300, c=c, slots=2, documents=documents)
    assert (selection.blocks_BHQN >= 0).sum() > 90
    check(kernels, selection, kv_heads=1, dtype=HALF, united=9)


@pytest.mark.parametrize(
    "tuning",
    [
        dict(chunk=1, longest=1),
        dict(chunk=70, longest=5, rows=16, merged=16),
        dict(chunk=1000, longest=1000, rows=64, merged=64, united=1),
        dict(chunk=32, united=16, together=0, streamed=True),
    ],
    ids=["single_queries", "odd", "one_chunk", "full_groups"],
)
def test_chunks_and_items(kernels, tuning):
    check(kernels, drawn(30 if tuning["chunk"] == 1 else 150, heads=2), **tuning)


@documents
@pytest.mark.parametrize("start", [5, 37, 99])
def test_last_queries_only(kernels, start, documents):
    selection = drawn(100, documents=documents, start=start)
    for united in (17, 4):
        check(kernels, selection, united=united, chunk=30)


def test_all_queries_choose_one_block(kernels):
    selection = drawn(110, slots=1)
    blocks = torch.full_like(selection.blocks_BHQN, -1)
    blocks[:, :, 48:] = 1
    for united in (17, 16):
        check(kernels, replace(selection, blocks_BHQN=blocks), united=united, longest=10)


def test_nothing_chosen(kernels):
    selection = drawn(40, empty=1.0)
    assert (selection.blocks_BHQN < 0).all()
    check(kernels, selection)
    check(kernels, replace(selection, blocks_BHQN=selection.blocks_BHQN[..., :0]))


def test_a_block_of_another_document_gives_nothing(kernels):
    selection = drawn(100, documents=True, slots=1)
    blocks = torch.full_like(selection.blocks_BHQN, -1)
    blocks[:, :, 92:] = 0  # documents start at 50 and 90
    check(kernels, replace(selection, blocks_BHQN=blocks), united=17)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_a_scale_that_turns_the_order_of_the_logits(kernels, scale):
    check(kernels, drawn(63, documents=True), scale=scale, united=6)


def test_near_and_far_are_the_choice(kernels):
    selection = drawn(150, start=7, heads=2)
    blocks = selection.blocks_BHQN
    near, far = [], []
    lists = kernels.make_lists(
        replace(selection, blocks_BHQN=blocks.to(DEVICE)), kernels.Tuning(chunk=40, united=5)
    )
    found_far = lists.far.unflatten(0, (2, lists.chunks)).transpose(1, 2).flatten(2, 3).cpu()
    assert lists.chunks == 4 and (found_far[:, :, 143:] == -1).all()
    seen = [0, 0]
    for b in range(2):
        for h in range(2):
            for t in range(143):
                group = (t + 7) // 16 * 16
                rows = blocks[b, h, max(0, group - 7) : group + 16 - 7].flatten().tolist()
                own = [x for x in blocks[b, h, t].tolist() if x >= 0]
                near = [x for x in own if rows.count(x) >= 5]
                far = [x for x in own if rows.count(x) < 5]
                for want, got in ((near, lists.near.blocks_BHQN.cpu()), (far, found_far)):
                    assert got[b, h, t].tolist() == want + [-1] * (4 - len(want))
                seen[0], seen[1] = seen[0] + len(near), seen[1] + len(far)
    assert min(seen) > 50
    assert int(lists.used.sum()) <= seen[1]


@documents
def test_no_result_depends_on_uninitialised_memory(kernels, documents, monkeypatch):
    def poisoned(make):
        def call(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(torch.nan if made.is_floating_point() else -(2**30))

        return call

    selection = drawn(100, documents=documents)
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    check(kernels, selection, united=6)


def test_what_it_refuses(kernels):
    q = torch.randn(1, 32, 32, 16, device=DEVICE)
    selection = Selection(
        SelectionSpec(16, 16), torch.full((1, 1, 2, 1), -1, device=DEVICE), 32, 32
    )
    with pytest.raises(ValueError, match="R = 1"):
        kernels.attend(q, q, q, selection, kernels.Tuning())
    selection = Selection(
        SelectionSpec(16, 1), torch.full((1, 1, 32, 1), -1, device=DEVICE), 32, 32
    )
    k = q[:, :, :3]
    with pytest.raises(ValueError, match="2 at a time"):
        kernels.attend(q[:, :, :6], k, k, selection, kernels.Tuning(together=2))
    k = q[:, :, :1]
    with pytest.raises(ValueError, match="32 heads"):
        kernels.attend(q, k, k, selection, kernels.Tuning(rows=16))


def test_the_command(study, monkeypatch, tmp_path, capsys):
    command = study[1]
    file = tmp_path / "out.json"
    names = ["all far", "chunks of 1024, two lanes"]
    monkeypatch.setattr(
        sys, "argv", ["query_gathering.py", "--seq-len", "96", "--k", "96", "--heads", "2",
                      "--kv-heads", "1", "--key-block", "16", "--head-dim", "32",
                      "--tunings", *names, "--out", str(file)],
    )  # fmt: skip
    command.main()
    report = json.loads(file.read_text())
    assert [row["name"] for row in report["records"]] == names
    for row in report["records"]:
        assert "error" not in row and row["difference"]["out"] < 1e-2
        assert row["whole_ms"] > 0 and row["rows_computed"] >= 1
    assert report["paired_groups"]["difference"]["out"] < 1e-2
    assert report["records"][0]["far_choices"] > 0.3 and "union_tiles_ms" in report
    assert names[1] in capsys.readouterr().out
