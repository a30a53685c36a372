"""The Triton kernels of sparse attention against one softmax over a T x S mask.

On a machine without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import granularity_id, make_selection
from test_sparse_attention import inputs, run

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (C, R): lists of blocks owned by a program, of single keys, R not a power of two.
GRANULARITIES = [(16, 16), (32, 24), (64, 64), (4, 16), (1, 32)]
granularities = pytest.mark.parametrize("granularity", GRANULARITIES, ids=granularity_id)
documents = pytest.mark.parametrize("documents", [False, True], ids=["one_doc", "docs"])


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
