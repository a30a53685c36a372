"""Query gathering, the forward of long calls whose queries choose for themselves, against one
softmax over a T x S mask; and that no past depends on the future."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_cases import captured_in_a_graph, make_documents
from test_fused_gate import gate_for
from test_fused_gate import run as run_gated
from test_sparse_attention import inputs
from test_triton_attention import DEVICE, HALF, check, documents, on_device

from gsa_kernels.selection import Selection, SelectionSpec
from gsa_kernels.sparse_attention import sparse_attention

pytest.importorskip("triton")

pytestmark = pytest.mark.kernel

STUDY = Path(__file__).parents[2] / "experiments" / "speed"


@pytest.fixture(autouse=True)
def gathers(monkeypatch):
    """Small chunks from the first query on; a call sets other sizes. Afterwards some call must
    have gathered."""
    from gsa_kernels.sparse_attention import gather_launch, triton_config

    made = []
    split = gather_launch.split
    monkeypatch.setattr(gather_launch, "split", lambda *args: made.append(1) or split(*args))

    def sizes(**values):
        for name, value in values.items():
            monkeypatch.setattr(triton_config, f"GATHER_{name.upper()}", value)

    sizes(**{"from": 0}, chunk=64, longest=24, united=6)
    yield sizes
    assert made


def drawn(length, *, c=16, heads=1, slots=4, documents=False, start=0, empty=0.2, seed=0):
    """Random choices of the last queries from `start`. Neighbours agree on some blocks that they
    like, so that choices are near and far; some rows choose nothing."""
    g = torch.Generator().manual_seed(seed)
    # Without sinks a choice may begin before its document.
    spec = SelectionSpec(c, 1, window=17, sinks=0 if documents else 5, heads=heads)
    docs = make_documents(length) if documents else None
    layout = Selection(spec, torch.full((2, heads, length, 1), -1), length, length, 0, docs).layout
    may = layout.candidates(slice(None), layout.n_blocks).expand(2, -1, -1)[:, None]
    score = torch.rand(2, heads, length, layout.n_blocks, generator=g)
    liked = torch.rand(2, heads, length, layout.n_blocks, generator=g) < 0.3
    score = score + liked * torch.arange(layout.n_blocks) % 7
    score = score.masked_fill(~may, -1)
    score[torch.rand(2, heads, length, generator=g) < empty] = -1
    width = min(slots, layout.n_blocks)
    best = score.topk(width, -1)
    last = layout.n_blocks
    chosen = best.indices.masked_fill(best.values < 0, last).sort(-1).values
    chosen = torch.nn.functional.pad(chosen, (0, slots - width), value=last)
    blocks = chosen.masked_fill(chosen == last, -1).to(torch.int32)[:, :, start:].contiguous()
    return Selection(spec, blocks, length - start, length, start, docs)


def compare(selection, tensors=None, *, dtype=torch.float32, scale=None, mass=True, **shape):
    """Error of out, lse and mass <= 2 x that of the reference in the same precision."""
    low = [x.to(DEVICE, dtype) for x in (tensors or inputs(selection, **shape))[:3]]
    selection = on_device(selection)

    def found(tensors, impl):
        result = sparse_attention(
            *tensors, selection, need_lse=True, need_mass=mass, impl=impl, scale=scale
        )
        return result.out_BTHE, result.lse_BTH, *([result.mass_BHQN] if mass else [])

    exact = found([x.double() for x in low], "reference")
    allowed, got = found(low, "reference"), found(low, "triton")
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    for name, value, other, mine in zip(("out", "lse", "mass"), exact, allowed, got):
        error, limit = ((x.double() - value).norm() for x in (mine, other))
        floor = 4 * torch.finfo(torch.float32).eps * value.norm()
        assert error <= 2 * limit + floor + 1e-6, (name, float(error), float(limit))


@documents
@pytest.mark.parametrize(("length", "united"), [(1, 6), (63, 17), (100, 6)])
def test_it_is_the_reference(gathers, length, united, documents):
    gathers(united=united)
    compare(drawn(length, documents=documents, heads=1 + length % 2))


def test_gradients():
    selection = drawn(70, heads=2, documents=True, slots=3)
    check(selection, inputs(selection), with_bias=False)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "held", "width"), [(4, 1, 1, 24), (2, 2, 9, 64), (6, 2, 3, 24)]
)
def test_heads_and_widths(gathers, heads, kv_heads, held, width):
    """held: sequences and key-value heads whose parts are held at once."""
    for choices in {1, kv_heads}:
        gathers(bytes=held * 30 * 4 * (heads // kv_heads) * (width * 4 + 8), chunk=30)
        selection = drawn(60, heads=choices)
        compare(selection, heads=heads, kv_heads=kv_heads, width=width)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_training_gives_the_bits_of_inference(dtype):
    selection = on_device(drawn(70, documents=True))
    q, k, v = (x.to(DEVICE, dtype) for x in inputs(selection)[:3])
    want = sparse_attention(q, k, v, selection, impl="triton").out_BTHE
    got = sparse_attention(q.requires_grad_(), k, v, selection, impl="triton").out_BTHE
    assert got.requires_grad and torch.equal(got, want)


@documents
@pytest.mark.parametrize("c", [16, 64])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision(gathers, c, documents, dtype):
    gathers(united=9)
    selection = drawn(150 if c == 16 else 300, c=c, slots=2, documents=documents)
    assert (selection.blocks_BHQN >= 0).sum() > 90
    compare(selection, kv_heads=1, dtype=dtype, width=32)


@documents
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_runs_of_blocks_are_taken_two_at_a_time(gathers, monkeypatch, dtype, documents):
    from gsa_kernels.sparse_attention import gather_launch

    gathers(united=17)
    made, kernel = [], gather_launch.run

    def run(called, grid, *args, **options):
        made.append(options.get("PAIR"))
        kernel(called, grid, *args, **options)

    monkeypatch.setattr(gather_launch, "run", run)
    selection = drawn(170, slots=5, documents=documents, heads=2)
    spec = gather_launch.split(on_device(selection), 64, 17, 24, True, True)
    assert (spec.used_BHQD > 0).any((0, 1, 2)).all() and spec.counts_3BHT[2].max() == 2
    compare(selection, dtype=dtype, width=32, kv_heads=2, heads=6)
    assert {True, False} <= set(made)
    made.clear()
    gathers(pairs=False)
    compare(selection, dtype=dtype, width=32, kv_heads=2, heads=6)
    assert True not in made and False in made


@pytest.mark.parametrize(("heads", "kv_heads", "held"), [(2, 1, 1), (6, 3, 2), (4, 2, 9)])
def test_launches_take_the_short_way(gathers, monkeypatch, heads, kv_heads, held):
    """launch.py takes Triton's own, slow way where a tensor is not aligned to 16 bytes."""
    from gsa_kernels.sparse_attention import gather_launch

    each = 32 * 5 * (heads // kv_heads) * (32 * 4 + 8)
    gathers(united=17, bytes=held * each, chunk=32)
    odd, kernel = [], gather_launch.run

    def run(called, grid, *args, **options):
        tensors = (x for x in args if isinstance(x, torch.Tensor))
        odd.append(sum(x.data_ptr() % 16 > 0 for x in tensors))
        kernel(called, grid, *args, **options)

    monkeypatch.setattr(gather_launch, "run", run)
    compare(drawn(172, slots=5), width=32, heads=heads, kv_heads=kv_heads)
    assert len(odd) > 12 and not any(odd)


def test_a_sum_of_large_halves_does_not_overflow(gathers):
    """The values of 32 keys with equal weights: 32 x 40000 is no float16, their mean is."""
    gathers(united=17)
    selection = drawn(170, slots=5)
    q, k, v = (x.to(DEVICE, torch.float16) for x in inputs(selection)[:3])
    v.fill_(40000)
    out = sparse_attention(q, k, v, on_device(selection), impl="triton").out_BTHE
    torch.testing.assert_close(out, torch.full_like(out, 40000), rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    "sizes",
    [dict(chunk=1, longest=1), dict(chunk=70, longest=5, bytes=9000),
     dict(chunk=1000, longest=1000, united=1), dict(chunk=32, united=16)],
    ids=["single_queries", "little_memory", "one_chunk", "full_groups"],
)  # fmt: skip
def test_chunks_and_items(gathers, sizes):
    gathers(**sizes)
    compare(drawn(30 if sizes["chunk"] == 1 else 130, heads=2), mass="united" in sizes)


@documents
@pytest.mark.parametrize("start", [5, 37, 99])
def test_last_queries_only(gathers, start, documents):
    gathers(chunk=30, united=4)
    compare(drawn(100, documents=documents, start=start))


def test_all_queries_choose_one_block(gathers):
    selection = drawn(110, slots=1)
    blocks = torch.full_like(selection.blocks_BHQN, -1)
    blocks[:, :, 48:] = 1
    for united in (17, 16):
        gathers(united=united, longest=10)
        compare(replace(selection, blocks_BHQN=blocks))


def test_nothing_chosen():
    selection = drawn(40, empty=1.0)
    assert (selection.blocks_BHQN < 0).all()
    compare(selection)
    compare(replace(selection, blocks_BHQN=selection.blocks_BHQN[..., :0]))


def test_a_block_of_another_document_gives_nothing(gathers):
    gathers(united=17)
    selection = drawn(100, documents=True, slots=1)
    blocks = torch.full_like(selection.blocks_BHQN, -1)
    blocks[:, :, 92:] = 0  # documents start at 50 and 90
    compare(replace(selection, blocks_BHQN=blocks))


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_a_scale_that_turns_the_order_of_the_logits(scale):
    compare(drawn(63, documents=True), scale=scale)


@pytest.mark.parametrize("per_head", [True, False], ids=["headwise", "elementwise"])
def test_a_gate_rounds_as_a_multiplication_does(per_head):
    selection = on_device(drawn(60, slots=3))
    tensors = [x.to(DEVICE, HALF[0]) for x in inputs(selection)]
    gate = gate_for(tensors[0], per_head).to(DEVICE, HALF[0])
    args = (selection, tensors, gate, "triton")
    got = run_gated(*args, with_bias=False)
    want = run_gated(*args, fused=False, with_bias=False)
    for name, value in want.items():
        if name in ("out", "lse") and DEVICE == "cpu":
            assert torch.equal(got[name], value), name
        torch.testing.assert_close(got[name], value, rtol=2e-2, atol=2e-2, msg=name)
    with torch.no_grad():  # no ungated output is kept
        out = sparse_attention(*tensors[:3], selection, gate_BTHE=gate, impl="triton").out_BTHE
    assert torch.equal(out, got["out"])


def parts_of(distant, paired):
    """Far choices, ascending, as pairs and then single blocks."""
    pairs, singles = [], []
    while distant:
        two = paired and len(distant) > 1 and distant[1] == distant[0] + 1
        (pairs if two else singles).append(distant[: 1 + two])
        distant = distant[1 + two :]
    return pairs, singles


@pytest.mark.parametrize("paired", [False, True], ids=["single", "paired"])
def test_near_and_far_are_the_choice(paired):
    from gsa_kernels.sparse_attention import gather_launch

    selection = drawn(250, start=7, heads=2)
    blocks = selection.blocks_BHQN
    on_gpu = replace(selection, blocks_BHQN=blocks.to(DEVICE))
    found = gather_launch.split(on_gpu, 40, 5, 9, True, paired)
    near, moved = found.near.blocks_BHQN.tolist(), found.moved_BHTN.tolist()
    places, items = found.places_BHL.tolist(), found.items_BHQDM3.tolist()
    entries = found.entries_BHTN.tolist()
    used, counts = found.used_BHQD.tolist(), found.counts_3BHT.tolist()
    seen = [0, 0, 0]
    for b in range(2):
        for h in range(2):
            far = {}  # (query, number of its part) -> blocks
            for chunk, kind in itertools.product(range(len(used[b][h])), range(1 + paired)):
                for block, first, last in items[b][h][chunk][kind][: used[b][h][chunk][kind]]:
                    assert 0 < last - first <= 9
                    for at in range(first, last):
                        place = places[b][h][chunk * 160 + at]
                        key = chunk * 40 + place // 4, place % 4
                        assert key not in far and entries[b][h][key[0]][key[1]] == at
                        far[key] = [block, block + 1][: 1 + kind]
            lists = [[x for x in row if x >= 0] for row in blocks[b, h].tolist()]
            for t, own in enumerate(lists):
                last = (t + 7) // 16 * 16 - 7
                asked = lists[max(0, last - 16) : max(0, last)]
                rows = [x for row in asked for x in row]
                close = [x for x in own if rows.count(x) >= 5]
                pairs, singles = parts_of([x for x in own if rows.count(x) < 5], paired)
                assert near[b][h][t] == close + [-1] * (4 - len(close))
                parts = pairs + singles
                assert [far.pop((t, i)) for i in range(len(parts))] == parts
                distant = [x for part in parts for x in part]
                assert [c[b][h][t] for c in counts] == [len(close), len(distant), len(pairs)]
                assert set(entries[b][h][t][len(parts) :]) <= {-1}
                assert [(close + distant)[i] for i in moved[b][h][t][: len(own)]] == own
                seen = [x + len(y) for x, y in zip(seen, (close, singles, pairs))]
            assert not far
    assert min(seen) > (50 if paired else -1) and seen[0] > 50


def test_the_past_is_the_same_to_the_bit_whatever_follows():
    """Neither later tokens and choices nor the other sequence change what a row is."""
    whole, other = (drawn(100, slots=3, seed=seed) for seed in (0, 5))
    low, blocks = 70, whole.blocks_BHQN.clone()
    blocks[0, :, low:], blocks[1] = -1, other.blocks_BHQN[1]
    tensors = [x.to(DEVICE, torch.float32) for x in inputs(whole)[:3]]
    changed = [x.clone() for x in tensors]
    for x in changed:
        x[0, low:], x[1] = x[0, low:].flip(0) + 1, x[1].flip(0) + 1
    found = []
    for x, chosen in ((tensors, whole.blocks_BHQN), (changed, blocks)):
        selection = on_device(replace(whole, blocks_BHQN=chosen))
        result = sparse_attention(*x, selection, need_lse=True, need_mass=True, impl="triton")
        mass = result.mass_BHQN.transpose(1, 2)
        found.append([y[0, :low] for y in (result.out_BTHE, result.lse_BTH, mass)])
    assert all(torch.equal(*pair) for pair in zip(*found))


@documents
def test_no_result_depends_on_uninitialised_memory(documents, monkeypatch):
    def poisoned(make):
        def call(*args, **kwargs):
            made = make(*args, **kwargs)
            whole = not made.is_floating_point()
            return made.fill_(torch.iinfo(made.dtype).min // 2 if whole else torch.nan)

        return call

    selection = drawn(100, documents=documents)
    tensors = inputs(selection)
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    compare(selection, tensors)
    compare(selection, tensors, dtype=HALF[0])  # with residuals


def test_who_gathers(gathers):
    from gsa_kernels.sparse_attention.gather_launch import split_choices

    selection = drawn(60)
    q, k, _, bias = inputs(selection, dtype=torch.float32)

    def taken(q=q, k=k, selection=selection, bias=None):
        return split_choices(q, k, on_device(selection), bias, False) is not None

    blocks = selection.blocks_BHQN
    assert taken() and not taken(bias=bias)
    gathers(**{"from": 61})
    assert not taken()
    gathers(**{"from": 60})
    assert taken()
    tiles = replace(selection, spec=SelectionSpec(16, 16), blocks_BHQN=blocks[:, :, ::16])
    assert not taken(selection=tiles)
    assert not taken(selection=replace(selection, spec=SelectionSpec(8, 1)))
    wide = q.new_empty(2, 60, 66, 16)  # 33 heads of a group, a row each
    assert not taken(wide) and taken(wide[:, :, :64])
    assert not taken(q.new_empty(2, 60, 4, 1024), k.new_empty(2, 60, 2, 1024))


@pytest.mark.parametrize("slots", [29, 64])
@pytest.mark.parametrize("queries", [16384, 131073, 1 << 20])
def test_parts_take_the_memory_of_the_queries(gathers, monkeypatch, queries, slots):
    from gsa_kernels.sparse_attention import gather_launch, triton_config

    compare(drawn(20), mass=False)
    gathers(chunk=16384)
    monkeypatch.setattr(gather_launch, "split", lambda _, size, *rest: size)
    q = torch.empty(1, queries, 16, 128, dtype=torch.bfloat16, device="meta")
    blocks = torch.empty(1, 1, queries, slots, dtype=torch.int32, device="meta")
    selection = Selection(SelectionSpec(64, 1, window=128), blocks, queries, queries)
    size = gather_launch.split_choices(q, q[:, :, :4], selection, None, False)
    each = slots * 4 * (128 * 2 + 8)
    assert 5000 < size <= 16384 and -queries % size < queries / size  # equal chunks
    most = triton_config.bytes_of_parts(q)
    assert size * each <= most <= max(1 << 29, min(1 << 30, 2 * 2 * q.numel()))


def test_one_compiled_graph():
    from gsa_kernels.sparse_attention import ops

    selection = on_device(drawn(40, slots=2))
    q, k, v = (x.to(DEVICE, torch.float32) for x in inputs(selection)[:3])

    def layer(q, k, v):
        result = sparse_attention(q * 2, k, v, selection, need_mass=True, impl="triton")
        return result.out_BTHE.sin(), result.mass_BHQN

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(q, k, v), layer(q, k, v)):
        torch.testing.assert_close(a, b)
    blocks = selection.blocks_BHQN.contiguous()
    args = (q, k, v, blocks, None, None, None, [16, 1, 17, 5, 0], 0.25, True, True, False)
    torch.library.opcheck(
        ops.forward_operator, args, test_utils=("test_schema", "test_faketensor")
    )


def test_the_study_runs(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(STUDY))
    command = importlib.import_module("query_gathering")
    file, lists = tmp_path / "out.json", tmp_path / "lists.npz"
    np.savez(lists, blocks=drawn(80).blocks_BHQN[0, 0].numpy().astype(np.int16))
    monkeypatch.setattr(
        sys, "argv", ["query_gathering.py", "--lists", str(lists), "--heads", "2", "--kv-heads",
                      "1", "--head-dim", "32", "--key-block", "16", "--k", "128", "--united", "8",
                      "--chunk", "32", "--out", str(file)],
    )  # fmt: skip
    try:
        command.main()
        with pytest.raises(SystemExit, match=r"blocks? \d of 64 keys.*80 positions"):
            command.selection_of(lists, SelectionSpec(64, 1), torch.device("cpu"))
    finally:
        sys.modules.pop("query_gathering")
    unions, *found, again = json.loads(file.read_text())["records"]
    assert unions["design"] == again["design"] == "union tiles" and unions["ms"] > 0
    assert [row["pairs"] for row in found] == [0, 1]
    for row in found:
        assert "error" not in row and row["united"] == 8 and row["split_ms"] > 0
        assert max(row["difference"].values()) < (1e-5 if DEVICE == "cpu" else 2e-2)
        assert row["far_choices"] > 0 and row["pairs_of_a_query"] <= row["far_choices"] / 2


def test_traffic_alone_moves_what_gathering_moves(gathers, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(STUDY))
    traffic = importlib.import_module("gather_traffic")
    file, lists = tmp_path / "out.json", tmp_path / "lists.npz"
    gathers(chunk=170, united=17)
    np.savez(lists, blocks=drawn(170, slots=5).blocks_BHQN[0, 0].numpy().astype(np.int16))
    moved, move = [], traffic.move

    def checked(q, k, v, found, parts, kept):
        parts.fill_(torch.nan)
        move(q, k, v, found, parts, kept)
        counts = (found.counts_3BHT[1] - found.counts_3BHT[2])[0, 0]
        for t, count in enumerate(counts.tolist()):  # of the last key-value head
            assert (parts[t, :count, :16].view(-1, 16) == q[0, t, 2:].reshape(-1)[:16]).all()
        moved.append(int(counts.sum()))

    monkeypatch.setattr(traffic, "move", checked)
    sizes = ["--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--key-block", "16"]
    arguments = ["gather_traffic.py", str(lists), *sizes, "--out", str(file)]
    monkeypatch.setattr(sys, "argv", arguments)
    try:
        traffic.main()
    finally:
        for name in ("gather_traffic", "query_gathering"):
            sys.modules.pop(name, None)
    single, paired = json.loads(file.read_text())["records"]
    assert single["pairs_found"] == 0 < paired["pairs_found"] and single["kernels_ms"]
    assert single["far_choices"] == paired["far_choices"] == moved[0]
    assert paired["far_choices"] - paired["pairs_found"] == moved[-1]
    assert all(row["moved_ms"] > 0 and row["added_ms"] > 0 for row in (single, paired))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_captured_in_a_cuda_graph():
    selection = on_device(drawn(300))
    q, k, v = (x.to(DEVICE, HALF[0]) for x in inputs(selection)[:3])

    def step():
        result = sparse_attention(q, k, v, selection, need_mass=True, impl="triton")
        return result.out_BTHE, result.mass_BHQN

    graph, captured = captured_in_a_graph(step)
    q.copy_(torch.randn_like(q))
    graph.replay()
    for a, b in zip(captured, step()):
        assert torch.equal(a, b)
