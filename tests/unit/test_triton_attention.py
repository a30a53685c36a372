"""The Triton kernels of sparse attention against one softmax over a T x S mask.

On a machine without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

import math
import mmap

import pytest
import torch
from kernel_cases import captured_in_a_graph, granularity_id, make_selection
from test_sparse_attention import inputs, run

from gsa_kernels.selection import Selection, SelectionSpec
from gsa_kernels.sparse_attention import sparse_attention

pytest.importorskip("triton")

pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (C, R): lists of blocks owned by a program, of single keys, R not a power of two.
GRANULARITIES = [(16, 16), (32, 48), (64, 64), (4, 16), (1, 32)]
granularities = pytest.mark.parametrize("granularity", GRANULARITIES, ids=granularity_id)
# Triton's interpreter multiplies bfloat16 matrices as if they were integers.
HALF = [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
documents = pytest.mark.parametrize("documents", [False, True], ids=["one_doc", "docs"])


UNITED = [(16, 1), (32, 1), (64, 1)]  # each query has its own list of blocks


def on_device(selection):
    docs = selection.doc_start_BS
    return type(selection)(
        selection.spec,
        selection.blocks_BHQN.to(DEVICE),
        selection.n_queries,
        selection.n_keys,
        selection.q_start,
        None if docs is None else docs.to(DEVICE),
    )


def check(selection, tensors, dtype=torch.float32, **kwargs):
    """Error of the kernel <= 2 x that of the same formula in the same precision (+ rounding)."""
    selection = on_device(selection)
    low = [x.to(DEVICE, dtype) for x in tensors]
    exact = run(selection, [x.double() for x in low], "reference", **kwargs)
    reference = run(selection, low, "reference", **kwargs)
    got = run(selection, low, "triton", **kwargs)
    assert got.keys() == exact.keys()
    for name, value in exact.items():
        error = (got[name].double() - value).norm()
        allowed = (reference[name].double() - value).norm()
        floor = 4 * torch.finfo(torch.float32).eps * value.norm()
        assert error <= 2 * allowed + floor + 1e-6, (name, float(error), float(allowed))


@granularities
@pytest.mark.parametrize("length", [1, 63, 150])
@documents
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "kv"])
def test_triton_is_the_reference(granularity, length, documents, shared):
    selection = make_selection(length, granularity, heads=1 if shared else 2, documents=documents)
    check(selection, inputs(selection))


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_a_scale_that_turns_the_order_of_the_logits(scale):
    selection = make_selection(63, (16, 16), documents=True)
    check(selection, inputs(selection), scale=scale)


@pytest.mark.parametrize("granularity", UNITED, ids=granularity_id)
@pytest.mark.parametrize("length", [1, 63, 150])
@documents
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "kv"])
def test_lists_of_single_queries(granularity, length, documents, shared):
    budget = 50 if granularity[0] < 64 else 150
    selection = make_selection(
        length,
        granularity,
        window=17,
        budget=budget,
        heads=1 if shared else 2,
        documents=documents,
    )
    check(selection, inputs(selection))


@pytest.mark.parametrize("start", [5, 37, 99])
def test_last_single_queries_only(start):
    whole = make_selection(100, (16, 1), window=17, budget=70, documents=True)
    blocks = whole.blocks_BHQN[:, :, start:]
    part = type(whole)(whole.spec, blocks, 100 - start, 100, start, whole.doc_start_BS)
    q, k, v, bias = inputs(whole)
    check(part, (q[:, start:], k, v, bias[:, :, start:]))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (16, 1)])
def test_single_queries_with_grouped_heads(heads, kv_heads, dtype):
    selection = make_selection(130, (32, 1), window=17, budget=100)
    check(selection, inputs(selection, heads, kv_heads, width=32), dtype)


owned = pytest.mark.parametrize("owned", [False, True], ids=["atomic", "owned"])


@pytest.fixture
def owned_keys(monkeypatch):
    from gsa_kernels.sparse_attention import triton_config

    return lambda owned: monkeypatch.setattr(triton_config, "OWNED_TOKENS", owned)


@pytest.mark.parametrize(
    ("length", "documents", "shared", "owned"),
    [(1, False, True, True), (20, True, True, False), (63, True, False, True),
     (70, True, True, True), (50, False, False, False)],
)  # fmt: skip
def test_single_keys_per_query(length, documents, shared, owned, owned_keys):
    owned_keys(owned)
    heads = 1 if shared else 2
    selection = make_selection(length, (1, 1), heads=heads, documents=documents)
    check(selection, inputs(selection))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (16, 1)])
def test_single_keys_with_grouped_heads(heads, kv_heads, dtype, owned_keys):
    owned_keys(kv_heads != 2)
    selection = make_selection(34, (1, 1), budget=20)
    check(selection, inputs(selection, heads, kv_heads, width=24), dtype)


@pytest.mark.parametrize(("shared", "documents"), [(True, True), (False, False)])
def test_sums_over_heads_in_several_launches(shared, documents, monkeypatch):
    """Of the mass and of the bias's gradient: parts of the heads, of one key-value head's too."""
    from gsa_kernels.sparse_attention import triton_config

    two = triton_config.PairSums(each=2, units=1, keys=16, stages=1)
    monkeypatch.setattr(triton_config, "pair_sums", lambda *_: two)
    selection = make_selection(37, (1, 1), heads=1 if shared else 2, documents=documents)
    check(selection, inputs(selection, 8, 2))


@pytest.mark.parametrize("heads", [(64, 4), (16, 16), (6, 3), (32, 32), (12, 12)], ids=str)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("gradient", [False, True])
def test_queries_whose_sums_are_taken_together_fit_shared_memory(heads, itemsize, gradient):
    from gsa_kernels.sparse_attention import triton_config

    shared, group = heads
    for width in (24, 128, 256):
        device = torch.device("cpu")
        found = triton_config.pair_sums(shared, group, width, itemsize, gradient, device)
        assert group % found.each == 0 and shared // found.each % found.units == 0
        rows = 16 * (1 << (found.each - 1).bit_length()) * found.units
        size = rows * (1 << (width - 1).bit_length()) * itemsize * (1 + gradient)
        assert size <= 1 << 16


@owned
def test_last_queries_of_single_keys(owned, owned_keys):
    owned_keys(owned)
    whole = make_selection(70, (1, 1), window=1, sinks=2, budget=20, documents=True)
    part = type(whole)(whole.spec, whole.blocks_BHQN[:, :, 37:], 33, 70, 37, whole.doc_start_BS)
    q, k, v, bias = inputs(whole)
    check(part, (q[:, 37:], k, v, bias[:, :, 37:]), with_bias=owned)


SMALL = [  # C, T, documents, one choice for all heads, window, sinks
    (2, 63, True, False, 7, 3),
    (4, 70, True, True, 17, 0),
    (8, 70, False, True, 6, 20),
    (8, 5, True, False, 7, 3),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
@owned
def test_small_blocks_of_single_queries(case, owned, owned_keys, monkeypatch):
    from gsa_kernels.sparse_attention import single_keys

    monkeypatch.setattr(single_keys, "_AT_ONCE", 1500)  # some queries at a time
    owned_keys(owned)
    c, length, documents, shared, window, sinks = case
    selection = make_selection(
        length,
        (c, 1),
        window=window,
        sinks=sinks,
        budget=50,
        heads=1 if shared else 2,
        documents=documents,
    )
    check(selection, inputs(selection), with_bias=owned or shared)


@pytest.mark.parametrize("documents", [False, True], ids=["one_doc", "docs"])
@pytest.mark.parametrize("c", [2, 3, 8])
@pytest.mark.parametrize("sinks", [0, 3, 20])
@pytest.mark.parametrize("window", [1, 7, 17])
def test_small_blocks_as_single_keys(documents, c, sinks, window):
    """The same keys, in order, and each block's own share of sums and bias."""
    from gsa_kernels.sparse_attention.single_keys import single_keys

    whole = make_selection(
        130, (c, 1), window=window, sinks=sinks, budget=60, heads=2, documents=documents
    )
    for selection in (whole, whole.rows(37, 130)):
        keys = single_keys(selection)
        mask, blocks = keys.selection.to_dense_mask(), keys.selection.blocks_BHQN
        assert torch.equal(mask, selection.to_dense_mask())
        there = blocks >= 0
        assert (there.int().diff(dim=-1) <= 0).all()
        assert (blocks.diff(dim=-1) > 0)[there[..., 1:]].all()
        expected = torch.zeros(selection.blocks_BHQN.shape)
        for inside in range(c):
            key = (selection.blocks_BHQN.long() * c + inside).clamp(0, selection.n_keys - 1)
            expected += mask.gather(-1, key) & (selection.blocks_BHQN >= 0)
        assert torch.equal(keys.summed(there.float()), expected)
        bias = torch.arange(expected.numel()).view_as(expected).float()
        assert torch.equal(keys.summed(keys.spread(bias)), bias * expected)


def test_last_queries_of_small_blocks():
    whole = make_selection(70, (4, 1), sinks=2, budget=30, documents=True)
    part = type(whole)(whole.spec, whole.blocks_BHQN[:, :, 37:], 33, 70, 37, whole.doc_start_BS)
    q, k, v, bias = inputs(whole)
    check(part, (q[:, 37:], k, v, bias[:, :, 37:]))


def test_unions_in_little_scratch(monkeypatch, owned_keys):
    from gsa_kernels.sparse_attention import triton_union

    owned_keys(True)
    monkeypatch.setattr(triton_union, "_SCRATCH", 3 * 140)  # three groups at a time
    monkeypatch.setattr(triton_union, "_SWEPT", 64)
    selection = make_selection(70, (1, 1), sinks=0)
    q, k, v, bias = inputs(selection, 2, 1)
    check(selection, (torch.zeros_like(q), k, v, bias))  # every logit equal but for the bias


@pytest.mark.parametrize(
    ("granularity", "owned"), [((1, 1), False), ((1, 1), True), ((16, 1), False)], ids=str
)
def test_unions_of_some_groups_at_a_time(granularity, owned, monkeypatch, owned_keys):
    from gsa_kernels.sparse_attention import triton_union

    owned_keys(owned)
    whole = make_selection(340, granularity, window=20, sinks=3, budget=60, documents=True)
    part = type(whole)(whole.spec, whole.blocks_BHQN[:, :, 37:], 303, 340, 37, whole.doc_start_BS)
    monkeypatch.setattr(triton_union, "_SCRATCH", 1)
    assert triton_union.parts(part, 0) == [(0, 16), (16, 4)]
    q, k, v, bias = inputs(whole, 2, 1)
    check(part, (q[:, 37:], k, v, bias[:, :, 37:]))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("length", "start", "heads", "kv_heads", "documents"),
    [(1, 0, 4, 1, False), (63, 0, 4, 2, True), (100, 37, 6, 2, True), (70, 31, 2, 2, False)],
)
def test_more_queries_are_united_in_the_backward(
    length, start, heads, kv_heads, documents, dtype, monkeypatch
):
    from gsa_kernels.sparse_attention import triton_launch, triton_union

    groups = []

    def unite(*args):
        groups.append(args[4])
        return triton_union.unite(*args)

    monkeypatch.setattr(triton_launch, "unite", unite)
    monkeypatch.setattr(triton_union, "_SCRATCH", 1)  # 16 groups at a time
    choices = 1 + length % 2 * (kv_heads - 1)
    whole = make_selection(
        length, (1, 1), heads=choices, window=5, sinks=3, budget=20, documents=documents
    )
    blocks, rest = whole.blocks_BHQN[:, :, start:], length - start
    part = type(whole)(whole.spec, blocks, rest, length, start, whole.doc_start_BS)
    q, k, v, bias = inputs(whole, heads, kv_heads, width=24)
    tensors = (q[:, start:], k, v, bias[:, :, start:])
    check(part, tensors, dtype, with_bias=False)
    same = [torch.zeros_like(q[:, start:]), *tensors[1:]]
    check(part, same, dtype, with_bias=False)
    assert set(groups) == {16, 32}  # forward, backward
    groups.clear()
    check(part, tensors, dtype)
    assert set(groups) == {16}  # pairs of a bias are numbered


@pytest.mark.parametrize("group", [16, 32])
def test_unions_of_long_lists_take_bounded_memory(group):
    from gsa_kernels.selection import Selection, SelectionSpec
    from gsa_kernels.sparse_attention import triton_union

    length = 131072
    spec = SelectionSpec(1, 1, window=128, sinks=64)
    blocks = torch.empty(1, 1, length, 1856, dtype=torch.int32, device="meta")
    found = triton_union.parts(Selection(spec, blocks, length, length), 0, group=group)
    assert sum(size for _, size in found) == length // group
    assert [first for first, _ in found] == [found[0][1] * i for i in range(len(found))]
    union, bits = 2 * 4 * group * (1856 + 64), group // 8 * length
    assert max(size for _, size in found) * (union + bits) < 3 << 27
    assert all(size % 16 == 0 for _, size in found)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("width", [16, 24, 64, 128])
@pytest.mark.parametrize("granularity", [(16, 16), (64, 64), (2, 32)], ids=granularity_id)
def test_half_precision(granularity, width, dtype):
    selection = make_selection(150, granularity, window=9, budget=100)
    check(selection, inputs(selection, width=width), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("width", [32, 96, 192, 256])
@pytest.mark.parametrize("granularity", [(16, 16), (16, 1), (1, 1)], ids=granularity_id)
def test_widths_that_are_padded_or_beyond_128(granularity, width, dtype):
    selection = make_selection(60, granularity, window=17, sinks=3, budget=40, documents=True)
    tensors = inputs(selection, 4, 2, width=width)
    check(selection, tensors, dtype, with_bias=dtype == torch.float32)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("granularity", [(64, 64), (16, 1), (1, 1)], ids=granularity_id)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
def test_keys_and_values_that_have_much_in_common(granularity, gated, dtype):
    """delta of the rounded output is wrong by the same for all keys: dq was wrong by 3 to 12 times
    the error of half precision."""
    selection = on_device(make_selection(300, granularity, window=40, budget=300))
    g = torch.Generator().manual_seed(5)

    def draw(length, heads, common):
        each = torch.randn(len(selection.blocks_BHQN), length, heads, 32, generator=g)
        return (each + common * torch.randn(1, 1, 1, 32, generator=g)).to(DEVICE, dtype)

    tensors = draw(300, 4, 0), draw(300, 2, 2), draw(300, 2, 2), draw(300, 4, 1)

    def gradients(impl, kind):
        leaves = [x.detach().to(kind).requires_grad_() for x in tensors]
        gate = leaves[3].sigmoid() if gated else None
        out = sparse_attention(*leaves[:3], selection, gate_BTHE=gate, impl=impl).out_BTHE
        return torch.autograd.grad(out.double().sin().sum(), leaves[:3])

    exact = gradients("reference", torch.float64)
    low, got = gradients("reference", dtype), gradients("triton", dtype)
    for name, value, other, mine in zip(("dq", "dk", "dv"), exact, low, got, strict=True):
        error, allowed = ((x.double() - value).norm() for x in (mine, other))
        assert error <= 1.5 * allowed, (name, float(error / allowed))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (16, 1)])
def test_grouped_heads(heads, kv_heads, dtype):
    for choices in {1, kv_heads}:
        selection = make_selection(100, (16, 32), heads=choices)
        check(selection, inputs(selection, heads, kv_heads), dtype)


@pytest.mark.parametrize("lse", [True, False], ids=["lse", "no_lse"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("sinks", [0, 20])
def test_options(lse, with_bias, sinks):
    selection = make_selection(100, (16, 16), sinks=sinks, documents=True)
    check(selection, inputs(selection), lse=lse, with_bias=with_bias, scale=0.7)


@pytest.mark.parametrize("granularity", [(16, 16), (4, 32)], ids=granularity_id)
@pytest.mark.parametrize("start", [5, 37, 99])
def test_last_queries_only(granularity, start):
    whole = make_selection(100, granularity, documents=True)
    first = start // granularity[1]
    blocks = whole.blocks_BHQN[:, :, first:]
    part = type(whole)(whole.spec, blocks, 100 - start, 100, start, whole.doc_start_BS)
    q, k, v, bias = inputs(whole)
    check(part, (q[:, start:], k, v, bias[:, :, first:]))


def test_a_deterministic_backward_is_the_same_every_time():
    selection = on_device(make_selection(400, (16, 16), budget=100))
    tensors = [x.to(DEVICE, torch.float32) for x in inputs(selection)]
    torch.use_deterministic_algorithms(True)
    try:
        first = run(selection, tensors, "triton")
        for _ in range(3):
            again = run(selection, tensors, "triton")
            assert all(torch.equal(again[n], x) for n, x in first.items())
    finally:
        torch.use_deterministic_algorithms(False)
    check(selection, tensors)


def zeros(*shape):
    """Halves; on a CPU, memory that is not taken before something is written to it."""
    if DEVICE == "cuda":
        return torch.zeros(shape, dtype=HALF[0], device=DEVICE)
    return torch.frombuffer(mmap.mmap(-1, 2 * math.prod(shape)), dtype=HALF[0]).view(shape)


@pytest.mark.parametrize(
    ("granularity", "queries", "gathers"),
    [((64, 16), 32, False), ((64, 1), 32, False), ((64, 1), 32, True), ((1, 1), 32, False),
     ((64, 16), 16, False)],
    ids=["tile", "block", "block_gathered", "token", "decode"],
)  # fmt: skip
def test_keys_past_2_31_numbers(granularity, queries, gathers, monkeypatch):
    """The last queries of a million keys, of which only those attended are not 0."""
    from gsa_kernels.sparse_attention import triton_config

    c, r = granularity
    monkeypatch.setattr(triton_config, "GATHER_FROM", 0 if gathers else 1 << 62)
    monkeypatch.setattr(triton_config, "GATHER_UNITED", 17)
    keys, heads, width = (1 << 20) - 64, 17, 128
    first = keys - 3000 - keys % c
    assert first * heads * width > 1 << 31
    k, v = (zeros(1, keys, heads, width) for _ in range(2))
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, queries, heads, width, generator=g).to(DEVICE, HALF[0])
    for x in (k, v):
        for at in (slice(0, 192), slice(first, None)):
            x[:, at] = torch.randn(x[:, at].shape, generator=g).to(x)
    spec = SelectionSpec(c, r, window=17, sinks=0)
    chosen = [1, 2, first // c, first // c + 1, first // c + 3]
    blocks = torch.tensor(chosen, dtype=torch.int32).expand(1, 1, queries // r, 5).contiguous()
    selection = on_device(Selection(spec, blocks, queries, keys, keys - queries))
    got = sparse_attention(q, k, v, selection, impl="triton").out_BTHE[0]
    far = [block * c + i for block in chosen for i in range(c)]
    for i in range(queries):
        t = keys - queries + i
        local = range((t // r * r - 16) // c * c, t + 1)
        some = torch.tensor([*far, *local], device=DEVICE)
        logits = torch.einsum("he,she->hs", q[0, i].double(), k[0, some].double()) / width**0.5
        want = torch.einsum("hs,she->he", logits.softmax(-1), v[0, some].double())
        torch.testing.assert_close(got[i].double(), want, rtol=0, atol=8e-3)


def test_blocks_attended_by_more_tiles_than_a_program_walks(monkeypatch):
    from gsa_kernels.sparse_attention import triton_config

    monkeypatch.setattr(triton_config, "ROWS_PER_SEGMENT", 64)
    selection = make_selection(300, (16, 16), budget=150, sinks=20)
    check(selection, inputs(selection))


@pytest.mark.parametrize(
    ("granularity", "documents"), [((16, 32), False), ((16, 32), True), ((1, 1), True)]
)
def test_no_result_depends_on_uninitialised_memory(granularity, documents, monkeypatch):
    length = 100 if granularity[1] > 1 else 24
    selection = on_device(make_selection(length, granularity, documents=documents))
    tensors = [x.to(DEVICE, torch.float32) for x in inputs(selection)]
    clean = run(selection, tensors, "triton")
    made = []

    def poisoned(make):
        def call(*args, **kwargs):
            made.append(make(*args, **kwargs))
            return made[-1].fill_(torch.nan) if made[-1].is_floating_point() else made[-1]

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    dirty = run(selection, tensors, "triton")
    assert len(made) > 3
    for name, value in clean.items():
        torch.testing.assert_close(dirty[name], value, msg=name)


@pytest.mark.parametrize("granularity", [(16, 16), (1, 1)], ids=granularity_id)
def test_operators_are_registered_truthfully(granularity):
    from gsa_kernels.sparse_attention import ops

    length = 40 if granularity[1] > 1 else 18
    selection = on_device(make_selection(length, granularity, documents=True))
    q, k, v, bias = (x.to(DEVICE, torch.float32).requires_grad_() for x in inputs(selection))
    docs = selection.doc_start_BS.to(torch.int32)
    spec = selection.spec
    sizes = [spec.key_block, spec.query_tile, spec.window, spec.sinks, 0]
    blocks = selection.blocks_BHQN.contiguous()
    args = (q, k, v, blocks, bias, docs, None, sizes, 0.25, True, True, False)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.forward_operator, args, test_utils=checks)


def test_float64_is_never_rounded():
    from gsa_kernels.sparse_attention.api import sparse_attention

    selection = on_device(make_selection(40, (16, 16)))
    q, k, v, _ = (x.to(DEVICE) for x in inputs(selection))
    with pytest.raises(ValueError, match="float64 needs eager"):
        sparse_attention(q, k, v, selection, impl="triton")
    assert sparse_attention(q, k, v, selection).out_BTHE.dtype == torch.float64


def test_refusals():
    from gsa_kernels.sparse_attention.api import sparse_attention

    for granularity, word in (
        ((5, 16), "key blocks"),
        ((16, 8), "query tiles"),
        ((3, 1), "key blocks"),
    ):
        selection = on_device(make_selection(40, granularity))
        q, k, v, _ = (x.to(DEVICE, torch.float32) for x in inputs(selection))
        with pytest.raises(ValueError, match=word):
            sparse_attention(q, k, v, selection, impl="triton")


@pytest.mark.parametrize("granularity", [(16, 16), (4, 1)], ids=granularity_id)
@pytest.mark.parametrize("documents", [False, True], ids=["one_doc", "docs"])
def test_one_compiled_graph(documents, granularity):
    from gsa_kernels.sparse_attention.api import sparse_attention

    selection = on_device(make_selection(63, granularity, documents=documents))
    q, k, v, bias = (x.to(DEVICE, torch.float32).requires_grad_() for x in inputs(selection))

    def layer(q, k, v, bias):
        result = sparse_attention(q * 2, k, v, selection, bias_BHQN=bias, impl="triton")
        return result.out_BTHE.sin().sum()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(layer(q, k, v, bias), (q, k, v, bias))
    found = torch.autograd.grad(compiled(q, k, v, bias), (q, k, v, bias))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_captured_in_a_cuda_graph():
    from gsa_kernels.sparse_attention.api import sparse_attention

    selection = on_device(make_selection(300, (16, 16), budget=150))
    q, k, v, _ = (x.to(DEVICE, torch.float16).requires_grad_() for x in inputs(selection))

    def step():
        out = sparse_attention(q, k, v, selection, impl="triton").out_BTHE
        return out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    graph, captured = captured_in_a_graph(step)
    with torch.no_grad():
        q.copy_(torch.randn_like(q))
    graph.replay()
    for a, b in zip(captured, step()):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
