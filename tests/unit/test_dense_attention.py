"""Dense attention: every kernel against one softmax, documents, and what is refused."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from attention_cases import DIMS, assert_same, draw, masked, varlen_oracle
from kernel_cases import causal, make_documents

from gsa_platform.contracts import Sequence
from gsa_platform.errors import UserError
from gsa_platform.validate import validate
from gsa_plugins.attention import fa3, sdpa, varlen
from gsa_plugins.attention.dense import DenseAttention
from gsa_plugins.attention.documents import Run, pack, runs
from gsa_plugins.configs import DenseAttentionConfig
from gsa_plugins.dense import dense_attention

lengths = pytest.mark.parametrize("length", [1, 63, 100])
documents = pytest.mark.parametrize("documents", [False, True], ids=["one_doc", "docs"])
BACKENDS = [b for b in sdpa.BACKENDS if b != "fa3"]


def case(length, documents, start=0):
    """(Sequence, mask) of the queries from `start` on."""
    docs = make_documents(length) if documents else None
    return Sequence(start, docs), causal(length, docs)[:, :, start:]


def precision(backend, device):
    """A precision the kernel has on this device."""
    if device == "cpu":
        return torch.float64
    return torch.bfloat16 if backend in ("auto", "flash", "cudnn") else torch.float32


def to(device, seq):
    docs = seq.doc_start_BS
    return Sequence(seq.q_start, None if docs is None else docs.to(device))


# Of PyTorch's own kernels on a GPU: float32 goes through the tensor cores in three parts.
VENDOR = 8


def run_or_skip(*args):
    """assert_same, skipped where the named kernel itself turns the shape away."""
    try:
        assert_same(*args, slack=VENDOR)
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        pytest.skip("PyTorch's kernel does not take this shape")


@pytest.mark.parametrize("backend", BACKENDS)
@lengths
@documents
def test_every_kernel_is_the_softmax(backend, length, documents, device):
    if sdpa.reasons(torch.device(device))[backend]:
        pytest.skip("refused on this device")
    seq, mask = case(length, documents)
    seq = to(device, seq)
    run_or_skip(
        lambda q, k, v: dense_attention(q, k, v, seq, backend),
        masked(mask),
        draw(length),
        device,
        precision(backend, device),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("start", [1, 37, 99])
@documents
def test_queries_that_continue_a_cache(backend, start, documents, device):
    if sdpa.reasons(torch.device(device))[backend]:
        pytest.skip("refused on this device")
    seq, mask = case(100, documents, start)
    seq = to(device, seq)
    run_or_skip(
        lambda q, k, v: dense_attention(q, k, v, seq, backend),
        masked(mask),
        draw(100 - start, 100),
        device,
        precision(backend, device),
    )


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (8, 1)])
def test_grouped_heads(heads, kv_heads, device):
    seq, mask = case(63, False)
    tensors = draw(63, heads=heads, kv_heads=kv_heads)
    for dtype in {torch.float32, precision("auto", device)}:
        attend = masked(mask)
        assert_same(
            lambda q, k, v: dense_attention(q, k, v, seq), attend, tensors, device, dtype, VENDOR
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@documents
def test_memory_is_linear_on_a_gpu(dtype, documents):
    seq = Sequence(0, torch.arange(16384).div(4096, rounding_mode="floor").mul(4096)[None].cuda())
    seq = seq if documents else Sequence()
    q, k, v = (torch.randn(1, 16384, n, 64, device="cuda", dtype=dtype) for n in (8, 2, 2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    dense_attention(*leaves, seq).sum().backward()
    # One T x S matrix of one head has 2**28 elements.
    assert torch.cuda.max_memory_allocated() - before < 2**28 * dtype.itemsize


def test_runs_of_documents():
    docs = make_documents(100)  # 0, 20, 21, 50 and 0, 37, 90
    assert runs(Sequence(0, docs), 2, 100)[:3] == [
        Run(0, 0, 0, 20),
        Run(0, 20, 20, 21),
        Run(0, 21, 21, 50),
    ]
    assert runs(Sequence(30, docs), 2, 15) == [
        Run(0, 21, 30, 45),
        Run(1, 0, 30, 37),
        Run(1, 37, 37, 45),
    ]
    assert runs(Sequence(30), 2, 15) == [Run(0, 0, 30, 45), Run(1, 0, 30, 45)]


@pytest.mark.parametrize("start", [0, 30])
def test_packing_keeps_every_query_in_order(start):
    q, k, v = draw(100 - start, 100)
    packed = pack(q, k, v, Sequence(start, make_documents(100)))
    assert torch.equal(packed.q_NHE.unflatten(0, (2, 100 - start)), q)
    assert packed.cumulative(packed.q_lengths).tolist()[-1] == 2 * (100 - start)
    low = 0
    for run, n in zip(packed.runs, packed.k_lengths):
        assert torch.equal(packed.k_MKE[low : low + n], k[run.row, run.first : run.stop])
        low += n
    assert low == packed.v_MKE.shape[0]


@pytest.mark.parametrize("version", ["grouped", "window", "causal"])
@pytest.mark.parametrize("start", [0, 30])
def test_arguments_of_the_varlen_kernel(version, start, monkeypatch):
    oracle, seen = varlen_oracle(), []

    def grouped(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        assert window_size == (-1, 0) and enable_gqa
        return oracle(q, k, v, cu_q, cu_k, max_q, max_k)

    def window(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1)):
        assert window_size == (-1, 0) and k.shape[1] == q.shape[1]
        return oracle(q, k, v, cu_q, cu_k, max_q, max_k)

    def causal_only(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):
        assert is_causal and k.shape[1] == q.shape[1]
        return oracle(q, k, v, cu_q, cu_k, max_q, max_k)

    kernel = {"grouped": grouped, "window": window, "causal": causal_only}[version]
    monkeypatch.setattr(varlen, "operator", lambda: kernel)
    monkeypatch.setattr(varlen, "usable", lambda q: seen.append(q) or True)
    seq, mask = case(100, True, start)
    tensors = draw(100 - start, 100)
    assert_same(lambda q, k, v: dense_attention(q, k, v, seq), masked(mask), tensors)
    assert seen


def test_the_varlen_kernel_is_for_cuda():
    assert not varlen.usable(torch.zeros(1, 4, 2, 16, dtype=torch.bfloat16))


@pytest.mark.parametrize("returns_lse", [False, True])
@pytest.mark.parametrize("start", [0, 30])
@documents
def test_arguments_of_flash_attention_3(returns_lse, start, documents, monkeypatch):
    oracle, called = varlen_oracle(), []

    def finish(out):
        called.append(out)
        return (out, None) if returns_lse else out

    def flash_attn_func(q, k, v, *, causal):
        assert causal
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        return finish(masked(mask[None, None])(q, k, v))

    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, *, causal):
        assert causal
        return finish(oracle(q, k, v, cu_q, cu_k, max_q, max_k))

    module = ModuleType("flash_attn_interface")
    module.flash_attn_func = flash_attn_func
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    fa3._module.cache_clear()
    monkeypatch.setattr(fa3, "reason", lambda device: "")
    monkeypatch.setattr(sdpa, "HALF", (torch.float64,))
    seq, mask = case(100, documents, start)
    attend = masked(mask)
    tensors = draw(100 - start, 100)
    assert_same(lambda q, k, v: dense_attention(q, k, v, seq, "fa3"), attend, tensors)
    fa3._module.cache_clear()
    assert called


@pytest.mark.gpu
@pytest.mark.parametrize("start", [0, 30])
@documents
def test_flash_attention_3(start, documents):
    if not torch.cuda.is_available() or fa3.reason(torch.device("cuda")):
        pytest.skip("FlashAttention-3 cannot run here")
    seq, mask = case(100, documents, start)
    seq = to("cuda", seq)
    assert_same(
        lambda q, k, v: dense_attention(q, k, v, seq, "fa3"),
        masked(mask),
        draw(100 - start, 100, width=64),
        "cuda",
        torch.bfloat16,
    )


@pytest.mark.parametrize("backend", ["cudnn", "efficient", "fa3"])
def test_a_kernel_that_needs_cuda_says_so(backend):
    q, k, v = draw(4)
    message = rf"attention.backend={backend} needs a CUDA device, not cpu; usable here: auto, fl"
    with pytest.raises(ValueError, match=message):
        dense_attention(q, k, v, Sequence(), backend)
    with pytest.raises(ValueError, match=message):
        DenseAttention(DenseAttentionConfig(backend=backend), DIMS).describe("cpu")


def test_reasons_on_a_gpu(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(fa3, "_installed", lambda: False)
    found = sdpa.reasons(cuda, torch.float32)
    assert [n for n, why in found.items() if not why] == ["auto", "efficient", "math"]
    assert "flash_attn_3" in found["fa3"] and "not float32" in found["cudnn"]
    assert not sdpa.reasons(cuda, torch.bfloat16)["flash"]
    monkeypatch.setattr(fa3, "_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "8.0 to 9.0, not 10.0" in fa3.reason(cuda)


def test_an_unknown_backend_names_the_choices():
    with pytest.raises(ValueError, match="'flush' is not one of auto, cudnn, flash, efficient"):
        DenseAttention(DenseAttentionConfig(backend="flush"), DIMS)


def test_auto_says_what_it_chose():
    line = DenseAttention(DenseAttentionConfig(), DIMS).describe("cpu")
    assert "auto (flash for bfloat16, flash for float32)" in line and "one call each" in line


def test_it_compiles():
    dense = DenseAttention(DenseAttentionConfig(), DIMS)
    compiled = torch.compile(dense, backend="aot_eager", fullgraph=True)
    seq, mask = case(63, False)
    attend = masked(mask)
    assert_same(lambda q, k, v: compiled(q, k, v, None, seq).out_BTHE, attend, draw(63))


@pytest.mark.parametrize(
    ("machine", "typed", "parts"),
    [
        ("cpu", ["attention.backend=cudnn"], ["needs a CUDA device", "auto, flash or math"]),
        ("cuda", ["attention.backend=flash"], ["no float32 kernel", "bf16-mixed", "efficient"]),
        ("cuda", ["attention.backend=flush"], ["flush", "Did you mean 'flash'"]),
        ("cuda", ["attention.backend=cudnn", "trainer.precision=bf16-mixed"], []),
        ("cuda", ["attention.backend=efficient"], []),
        ("cpu", ["attention.backend=flash"], []),
    ],
)
def test_refusals_before_training(machine, typed, parts):
    from gsa_platform import compose  # Hydra, which a GPU machine may lack

    cfg = compose.load(
        ["experiment=smoke", "attention=dense", f"trainer.accelerator={machine}", *typed]
    )
    if not parts:
        return validate(cfg)
    with pytest.raises(UserError) as caught:
        validate(cfg)
    for part in parts:
        assert part in str(caught.value)
