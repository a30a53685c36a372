"""The study of paired groups: attention by unions of two groups equals the reference."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace

import pytest
import torch
from test_query_gathering import DEVICE, HALF, STUDY, drawn

from gsa_kernels.sparse_attention import sparse_attention

pytest.importorskip("triton")

pytestmark = pytest.mark.kernel


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDY))
    monkeypatch.delitem(sys.modules, "paired_groups", raising=False)
    yield importlib.import_module("paired_groups")
    sys.modules.pop("paired_groups", None)


def check(study, selection, heads=4, kv_heads=2, width=16, dtype=torch.float32, **options):
    """Error of out and lse <= 2 x that of the reference in the same precision (+ rounding)."""
    g = torch.Generator().manual_seed(1)
    docs = selection.doc_start_BS
    selection = replace(
        selection,
        blocks_BHQN=selection.blocks_BHQN.to(DEVICE),
        doc_start_BS=None if docs is None else docs.to(DEVICE),
    )
    shapes = (selection.n_queries, heads), *((selection.n_keys, kv_heads),) * 2
    low = [torch.randn(2, *s, width, generator=g).to(DEVICE, dtype) for s in shapes]

    def reference(tensors):
        found = sparse_attention(*tensors, selection, need_lse=True, impl="reference", **options)
        return found.out_BTHE.double(), found.lse_BTH.double()

    exact, allowed = reference([x.double() for x in low]), reference(low)
    got = study.attend(*low, selection, **options)
    for name, value, other, mine in zip(("out", "lse"), exact, allowed, got):
        error, limit = ((x.double() - value).norm() for x in (mine, other))
        floor = 4 * torch.finfo(torch.float32).eps * value.norm()
        assert error <= 2 * limit + floor + 1e-6, (name, float(error), float(limit))


documents = pytest.mark.parametrize("documents", [False, True], ids=["one_doc", "docs"])


@documents
@pytest.mark.parametrize("length", [1, 63, 100, 200])
def test_it_is_the_reference(study, length, documents):
    check(study, drawn(length, documents=documents))


@documents
@pytest.mark.parametrize("start", [5, 37, 99])
def test_last_queries_only(study, start, documents):
    check(study, drawn(130, start=start, documents=documents))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (2, 2), (8, 1)])
def test_grouped_heads(study, heads, kv_heads):
    check(study, drawn(70, heads=kv_heads), heads, kv_heads)


@pytest.mark.parametrize("c", [16, 64])
def test_half_precision(study, c):
    check(study, drawn(300, c=c), width=64, dtype=HALF)


def test_groups_that_chose_nothing_or_all_the_same(study):
    selection = drawn(100)
    blocks = selection.blocks_BHQN.clone()
    blocks[:, :, 48:64] = -1
    blocks[:, :, 64:] = torch.tensor([1, 2, -1, -1], dtype=torch.int32)
    check(study, replace(selection, blocks_BHQN=blocks))
    check(study, replace(selection, blocks_BHQN=torch.full_like(blocks, -1)))


def test_unions(study):
    selection = drawn(150, start=21)
    on_device = replace(selection, blocks_BHQN=selection.blocks_BHQN.to(DEVICE))
    lists, bits, counts = study.unite(on_device)
    for pair in range(counts.shape[2]):
        first = pair * 32 - 21 % 32
        for line in range(2):
            chosen = {}
            for row in range(32):
                if 0 <= first + row < selection.n_queries:
                    for block in selection.blocks_BHQN[line, 0, first + row].tolist():
                        chosen[block] = chosen.get(block, 0) | 1 << row
            chosen.pop(-1, None)
            n = int(counts[line, 0, pair])
            assert lists[line, 0, pair, :n].tolist() == sorted(chosen)
            found = [x & 0xFFFFFFFF for x in bits[line, 0, pair, :n].tolist()]
            assert found == [chosen[b] for b in sorted(chosen)]


def test_what_it_refuses(study):
    selection = drawn(40)
    q, k = torch.zeros(2, 40, 4, 24), torch.zeros(2, 40, 2, 24)
    with pytest.raises(ValueError, match="24 channels"):
        study.attend(q, k, k, selection)
