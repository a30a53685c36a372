"""Dense causal attention by each backend of SDPA, the opponents of a benchmark.

Legend: B batch, H query heads, K key-value heads, T queries, S keys, E head width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .timing import turns_milliseconds

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Clock = Callable[[Sequence[Callable[[], Any]], torch.device, float], float]


def dense_times(
    tensors: list[tuple[Tensor, Tensor, Tensor]],
    names: list[str],
    backward: bool,
    others: dict[str, Attend] | None = None,
    budget_s: float = 1.0,
    clock: Clock = turns_milliseconds,
) -> tuple[dict[str, float], dict[str, str]]:
    """(milliseconds of each backend that runs here, why the others do not).

    tensors: sets of q_BTHE, k_BSKE, v_BSKE that take turns. T = S: causal; one query of many keys
    sees them all. others: further backends by name, which take and give [B, T, H, E]; those of
    SDPA get the layout that costs them no copy, and for a single query the better one of two.
    """
    found: dict[str, float] = {}
    refused: dict[str, str] = {}
    given = [[x.detach().requires_grad_(backward) for x in qkv] for qkv in tensors]
    first = [_heads_first(*qkv, backward) for qkv in tensors]  # once: a cache is large
    layouts = [first]
    if tensors[0][0].shape[1] == 1:
        layouts.append([[_grouped(q, k.shape[1]), k, v] for q, k, v in first])
    for name in names:
        foreign = others.get(name) if others else None
        attend = foreign or _sdpa(name, tensors[0][0].shape[1] > 1)
        for sets in [given] if foreign else layouts:
            dout = torch.randn_like(sets[0][0])
            calls = [partial(_run, attend, qkv, dout) for qkv in sets]
            try:
                with torch.set_grad_enabled(backward):
                    ms = clock(calls, dout.device, budget_s)
            except (RuntimeError, ValueError) as error:  # it does not take this shape, or device
                refused[name] = str(error).strip().partition("\n")[0]
            else:
                found[name] = min(ms, found.get(name, ms))
    refused = {name: why for name, why in refused.items() if name not in found}
    if not found:
        raise ValueError(f"no dense backend ran: {refused}; choose others with --dense")
    return found, refused


def _heads_first(q: Tensor, k: Tensor, v: Tensor, backward: bool) -> list[Tensor]:
    """[B, H, T, E] and twice [B, K, S, E]."""
    layout = (x.detach().transpose(1, 2).contiguous() for x in (q, k, v))
    return [x.requires_grad_(backward) for x in layout]


def _grouped(q_BH1E: Tensor, kv_heads: int) -> Tensor:
    """[B, K, H / K, E]: a group's heads as the queries of one head, so that keys are read once
    (but with fewer programs, where a backend has one per head)."""
    batch, _, _, width = q_BH1E.shape
    return q_BH1E.detach().reshape(batch, kv_heads, -1, width)


def _run(attend: Attend, qkv: list[Tensor], dout: Tensor) -> None:
    out = attend(*qkv)
    if qkv[0].requires_grad:
        torch.autograd.grad(out, qkv, dout)


def _sdpa(name: str, causal: bool) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device.type != "cuda" and q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        grouped = q.shape[1] != k.shape[1]
        with sdpa_kernel([BACKENDS[name]]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return attend
