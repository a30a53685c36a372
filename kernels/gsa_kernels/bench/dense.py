"""Dense causal attention by each backend of SDPA, the opponents of a benchmark.

Legend: B batch, H query heads, K key-value heads, T queries, S keys, E head width.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .timing import milliseconds

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense_times(
    q_BTHE: Tensor,
    k_BSKE: Tensor,
    v_BSKE: Tensor,
    names: list[str],
    backward: bool,
    others: dict[str, Attend] | None = None,
    budget_s: float = 1.0,
) -> tuple[dict[str, float], dict[str, str]]:
    """(milliseconds of each backend that runs here, why the others do not).

    T = S: causal; one query of many keys sees them all. others: further backends by name, which
    take and give [B, T, H, E]; those of SDPA get the layout that costs them no copy, and of a
    single query the heads of a group as its queries, so that keys are read once.
    """
    found, refused = {}, {}
    queries, keys = q_BTHE.shape[1], k_BSKE.shape[1]
    assert queries in (1, keys)
    given = [x.detach() for x in (q_BTHE, k_BSKE, v_BSKE)]
    first = [x.transpose(1, 2).contiguous() for x in given]  # once: a cache is large
    if queries == 1:
        first[0] = first[0].reshape(len(first[0]), k_BSKE.shape[2], -1, q_BTHE.shape[3])
    for name in names:
        foreign = others.get(name) if others else None
        layout = given if foreign else first
        q, k, v = (x.detach().requires_grad_(backward) for x in layout)
        run = partial(_run, foreign or _sdpa(name, queries > 1), q, k, v, torch.randn_like(q))
        try:
            with torch.set_grad_enabled(backward):
                found[name] = milliseconds(run, q.device, budget_s)
        except (RuntimeError, ValueError) as error:  # it does not take this shape, or device
            refused[name] = str(error).strip().partition("\n")[0]
    if not found:
        raise ValueError(f"no dense backend ran: {refused}; choose others with --dense")
    return found, refused


def _run(attend: Attend, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
    out = attend(q, k, v)
    if q.requires_grad:
        torch.autograd.grad(out, (q, k, v), dout)


def _sdpa(name: str, causal: bool) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device.type != "cuda" and q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        grouped = q.shape[1] != k.shape[1]
        with sdpa_kernel([BACKENDS[name]]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return attend
