"""Dense causal attention as a function, for the component `dense` and for dense warm-up steps."""

import torch
from torch import Tensor

from gsa_platform.contracts import Sequence

from .attention import fa3, sdpa, varlen
from .attention.documents import pack

PROBED_TILES = 4


def spread(n: int, count: int, step: int = 0) -> list[int]:
    """`count` of the numbers 0 .. n-1, evenly spaced, shifted by step along the golden ratio."""
    count = min(n, count)
    shift = (step * 0.6180339887498949 + 0.5) % 1.0
    return sorted({int((i + shift) * n / count) for i in range(count)})


def dense_attention(
    q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, seq: Sequence, backend: str = "auto"
) -> Tensor:
    """out_BTHE of causal attention inside documents, never holding T x S (but for math).

    Raises ValueError for a backend (attention.sdpa.BACKENDS) that cannot run on the inputs.
    """
    queries = q_BTHE.shape[1]
    keys = seq.q_start + queries
    if keys < k_BSKE.shape[1]:
        k_BSKE, v_BSKE = k_BSKE[:, :keys], v_BSKE[:, :keys]
    if backend != "auto" and not torch.compiler.is_compiling():
        sdpa.refuse(backend, q_BTHE.device, q_BTHE.dtype)
    if backend == "fa3":
        return fa3.attend(q_BTHE, k_BSKE, v_BSKE, seq)
    if seq.doc_start_BS is None and queries in (1, keys):
        return sdpa.attend(q_BTHE, k_BSKE, v_BSKE, backend)
    if seq.doc_start_BS is None and not (backend in ("auto", "flash") and varlen.usable(q_BTHE)):
        return sdpa.attend(q_BTHE, k_BSKE, v_BSKE, backend)
    return _packed(q_BTHE, k_BSKE, v_BSKE, seq, backend)


# The lengths of documents differ in every batch: compiled, they would be new shapes each time.
@torch.compiler.disable
def _packed(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, seq: Sequence, backend: str) -> Tensor:
    packed = pack(q_BTHE, k_BSKE, v_BSKE, seq)
    if backend in ("auto", "flash") and varlen.usable(q_BTHE):
        out = varlen.attend(packed)
    else:
        out = packed.each(lambda q, k, v: sdpa.attend(q, k, v, backend))
    return out.unflatten(0, q_BTHE.shape[:2])
