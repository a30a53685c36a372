"""xformers' masks against ours, and what is refused. Its operators need CUDA; its masks do not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from attention_cases import DIMS, assert_same, draw, masked
from kernel_cases import causal, make_documents

pytest.importorskip("xformers")

from gsa_platform import hardware, plugin_commands, registry
from gsa_platform.contracts import Sequence
from gsa_platform.errors import UserError
from gsa_platform.validate import validate
from gsa_plugins.attention import xformers_dense, xformers_ops
from gsa_plugins.attention.xformers_dense import XformersAttention, memory_efficient_attention
from gsa_plugins.configs import XformersConfig

windows = pytest.mark.parametrize("window", [0, 1, 7, 40, 200])
documents = pytest.mark.parametrize("documents", [False, True], ids=["one_doc", "docs"])


def mask_of(length, window, docs, start=0):
    mask = causal(length, docs)
    if window:
        mask = mask & torch.ones(length, length, dtype=torch.bool).triu(1 - window)
    return mask[:, :, start:]


class FakeOperator:
    """Computes what xformers' operators would, from the mask that the bias object draws."""

    def __init__(self):
        self.biases, self.ndims = [], set()

    def __call__(self, q, k, v, attn_bias):
        self.biases.append((type(attn_bias), q.dtype, q.requires_grad))
        self.ndims.add(q.ndim)
        inputs = xformers_ops.fmha().Inputs(q, k, v, attn_bias)
        inputs.validate_inputs()
        for operator in self.operators(q):
            why = operator.not_supported_reasons(inputs)
            why = [w for w in why if "device=" not in w and "bf16 is only" not in w]
            assert not [w for w in why if "wasn't built" not in w and "dtype=" not in w], why
        grouped = q.ndim == 5
        q, k, v = (x.flatten(2, 3) if grouped else x for x in (q, k, v))
        shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        mask = attn_bias.materialize(shape, dtype=torch.float32, device=q.device) == 0
        out = masked(mask)(q, k, v)
        return out.unflatten(2, (-1, 2)) if grouped else out

    @staticmethod
    def operators(q):
        """The operators that have to take these inputs on a GPU."""
        module = xformers_ops.fmha()
        kind = module.cutlass if q.dtype == torch.float32 else module.flash
        return [kind.FwOp, kind.BwOp] if q.requires_grad else [kind.FwOp]


@pytest.fixture
def operator(monkeypatch):
    fake = FakeOperator()
    module = xformers_ops.fmha()
    namespace = SimpleNamespace(attn_bias=module.attn_bias, memory_efficient_attention=fake)
    monkeypatch.setattr(xformers_dense.xformers_ops, "reason", lambda device_type: "")
    monkeypatch.setattr(
        xformers_dense,
        "xformers_ops",
        SimpleNamespace(fmha=lambda: namespace, reason=lambda device_type: ""),
    )
    return fake


@windows
@pytest.mark.parametrize("length", [1, 63, 100])
@documents
def test_its_masks_are_ours(window, length, documents, operator):
    docs = make_documents(length) if documents else None
    seq = Sequence(0, docs)
    for dtype in (torch.float64, torch.float32):
        assert_same(
            lambda q, k, v: memory_efficient_attention(q, k, v, seq, window),
            masked(mask_of(length, window, docs)),
            draw(length),
            dtype=dtype,
        )
    assert operator.ndims == {4}


@windows
@pytest.mark.parametrize("start", [1, 37, 99])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@documents
def test_queries_that_continue_a_cache(window, start, dtype, documents, operator):
    docs = make_documents(100) if documents else None
    q, k, v = (x.to(dtype) for x in draw(100 - start, 100))
    with torch.no_grad():
        got = memory_efficient_attention(q, k, v, Sequence(start, docs), window)
    expected = masked(mask_of(100, window, docs, start))(q, k, v)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert operator.ndims == {5 if dtype == torch.float64 else 4}


def test_sequences_without_documents_take_the_plain_masks(operator):
    q, k, v = draw(8)
    for window, start in ((0, 0), (0, 3), (4, 0)):
        memory_efficient_attention(q[:, start:], k, v, Sequence(start), window)
    names = [bias.__name__ for bias, *_ in operator.biases]
    assert names == [
        "LowerTriangularMask",
        "LowerTriangularFromBottomRightMask",
        "LocalAttentionFromBottomRightMask",
    ]


@pytest.mark.gpu
@windows
@pytest.mark.parametrize("length", [1, 63, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@documents
def test_the_operators(window, length, dtype, documents):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert not xformers_ops.reason("cuda"), xformers_ops.status()
    docs = make_documents(length) if documents else None
    seq = Sequence(0, None if docs is None else docs.cuda())
    assert_same(
        lambda q, k, v: memory_efficient_attention(q, k, v, seq, window),
        masked(mask_of(length, window, docs)),
        draw(length),
        "cuda",
        dtype,
        slack=8,  # of another's kernels, whose float32 goes through the tensor cores
    )


@pytest.mark.gpu
@windows
@pytest.mark.parametrize("start", [1, 37, 99])
@documents
def test_the_operators_continue_a_cache(window, start, documents):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    docs = make_documents(100) if documents else None
    seq = Sequence(start, None if docs is None else docs.cuda())
    q, k, v = (x.cuda().bfloat16() for x in draw(100 - start, 100))
    with torch.no_grad():
        got = memory_efficient_attention(q, k, v, seq, window)
    attend = masked(mask_of(100, window, docs, start))
    exact = attend(q.double(), k.double(), v.double())
    allowed = (attend(q, k, v).double() - exact).norm()
    assert (got.double() - exact).norm() <= 2 * allowed + 0.004 * exact.norm()


def test_a_cpu_is_refused_with_the_reason():
    layer = XformersAttention(XformersConfig(), DIMS)
    with pytest.raises(ValueError, match="no memory_efficient_attention on cpu, only on cuda"):
        layer(*draw(4), None, Sequence())
    with pytest.raises(ValueError, match="only on cuda"):
        layer.describe("cpu")


def test_a_cpu_is_refused_before_training():
    from gsa_platform import compose  # Hydra, which a GPU machine may lack

    cfg = compose.load(["experiment=smoke", "attention=xformers"])
    with pytest.raises(UserError, match="not on cpu: xformers has CUDA operators"):
        validate(cfg)


def test_the_list_and_show_say_why(monkeypatch):
    monkeypatch.setattr(
        hardware, "detect", lambda: hardware.Hardware("cpu", "CPU", 1, 16.0, 4, 16.0)
    )
    found = registry.get()
    listed = next(t for t in plugin_commands.list_text(found).splitlines() if "xformers" in t)
    assert "needs cuda, this machine has cpu: xformers has CUDA operators" in listed
    shown = plugin_commands.show_text(found, "xformers")
    assert "cutlassF" in shown and "PyTorch" in shown and "head_dims 8 to 256 by 8" in shown


def test_a_negative_window_is_refused():
    with pytest.raises(ValueError, match=r"attention\.window=-1 must be at least 0"):
        XformersAttention(XformersConfig(window=-1), DIMS)
    assert XformersAttention(XformersConfig(window=6), DIMS).mean_keys(100) < 6
    assert XformersAttention(XformersConfig(), DIMS).mean_keys(100) is None


def test_an_extension_that_did_not_load_says_what_to_install(monkeypatch):
    from xformers import _cpp_lib

    error = RuntimeError("xFormers can't load C++/CUDA extensions")
    error.__cause__ = OSError("Could not load this library")
    error.__cause__.__cause__ = OSError("libcudart.so.12: cannot open shared object file")
    monkeypatch.setattr(_cpp_lib, "_cpp_library_load_exception", error)
    monkeypatch.setattr(_cpp_lib, "_built_with_cuda", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    xformers_ops.operators.cache_clear()
    try:
        why = xformers_ops.operators()
        assert xformers_ops.reason("cuda").startswith("no operator is usable: ")
    finally:
        xformers_ops.operators.cache_clear()
    assert "libcudart.so.12: cannot open" in why["cutlassF-pt"]
    assert "pip install nvidia-cuda-runtime-cu12" in why["cutlassF-pt"]
