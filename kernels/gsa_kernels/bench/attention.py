"""Records of one layer's attention: the whole path and its parts, beside the fastest dense one.

What is timed: scoring, selection, value gate, attention and output gate (the projections of the
indexer and of q, k, v are not); with the backward also the KL objective on the selected keys.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gsa_kernels.sparse_attention import sparse_attention

from .case import Case, Shape
from .dense import Attend, dense_times
from .timing import milliseconds, peak_bytes
from .work import Rates, shares, work

PASSES = ("forward", "forward_backward", "decode")


def layer_record(
    shape: Shape,
    case: Case,
    name: str,
    dense: list[str],
    rates: Rates,
    others: dict[str, Attend] | None = None,
    budget_s: float = 1.0,
) -> dict[str, Any]:
    """One record; name: a pass, forward or forward_backward. others: see dense_times.

    score_ms and select_ms are those of the forward: neither has a backward but the KL's.
    """
    backward, device = name == "forward_backward", case.q.device
    case = case.learn() if backward else case
    selection = case.choose()
    v = case.gated_values.detach().requires_grad_(backward)
    dout = torch.randn_like(case.q)

    def attention() -> Any:
        out = sparse_attention(case.q, case.k, v, selection, impl=case.impl).out_BTHE
        return torch.autograd.grad(out, (case.q, case.k, v), dout) if backward else out

    whole: Callable[[], Any] = (lambda: case.train(dout)) if backward else case.forward
    with torch.set_grad_enabled(backward):
        times = {
            "score_ms": milliseconds(case.score, device, budget_s),
            "choose_ms": milliseconds(case.choose, device, budget_s),
            "attend_ms": milliseconds(attention, device, budget_s),
            "ours_ms": milliseconds(whole, device, budget_s),
        }
        extra = peak_bytes(whole, device)
    found, refused = dense_times(case.q, case.k, v, dense, backward, others, budget_s)
    record = _record(shape, name, times, found, refused, extra)
    counted = work(selection, shape.heads, shape.kv_heads)
    record["keys_attended"] = counted.pairs / (shape.heads * shape.seq_len * shape.batch)
    return record | shares(case.q, case.k, counted, backward, times["attend_ms"], rates)


def decode_record(
    shape: Shape,
    case: Case,
    dense: list[str],
    rates: Rates,
    others: dict[str, Attend] | None = None,
    budget_s: float = 1.0,
) -> dict[str, Any]:
    """One record of a single query against a cache: the case's query and its keys.

    ours_ms is a step that scores the whole cache and chooses anew. In tile mode this happens at
    one step of R; reuse_ms is the others', which go on with the tile's choice.
    """
    device = case.q.device
    r = shape.spec.query_tile
    assert case.factors.q_start % r == 0, "the query must begin a tile"
    with torch.no_grad():
        selection = case.choose()

        def attention() -> Tensor:
            return sparse_attention(case.q, case.k, case.v, selection, impl=case.impl).out_BTHE

        times = {
            "score_ms": milliseconds(case.score, device, budget_s),
            "choose_ms": milliseconds(case.choose, device, budget_s),
            "attend_ms": milliseconds(attention, device, budget_s),
            "ours_ms": milliseconds(case.forward, device, budget_s),
        }
        if r > 1:
            times["reuse_ms"] = milliseconds(lambda: case.attend(selection), device, budget_s)
        extra = peak_bytes(case.forward, device)
    found, refused = dense_times(case.q, case.k, case.v, dense, False, others, budget_s)
    record = _record(shape, "decode", times, found, refused, extra)
    if r > 1:
        mean = (times["ours_ms"] + (r - 1) * times["reuse_ms"]) / r
        record["ratio_mean_step"] = record["dense_ms"] / mean
    counted = work(selection, shape.heads, shape.kv_heads)
    record["cache_keys"] = case.k.shape[1] - 1
    record["keys_attended"] = counted.pairs / (shape.heads * shape.batch)
    return record | shares(
        case.q, _read(case.k, counted), counted, False, times["attend_ms"], rates
    )


def _read(k: Tensor, counted: Any) -> Tensor:
    """As many keys as one query reads: the rest of the cache is not compulsory."""
    keys = int(counted.rows / (k.shape[0] * k.shape[2]))
    return k[:, : min(keys, k.shape[1])]


def _record(
    shape: Shape,
    name: str,
    times: dict[str, float],
    dense: dict[str, float],
    refused: dict[str, str],
    extra: int,
) -> dict[str, Any]:
    best = min(dense, key=dense.__getitem__)
    choose = times.pop("choose_ms")
    return {
        **shape.fields(),
        "pass": name,
        "dense_backend": best,
        "dense_ms": dense[best],
        "dense_all_ms": dense,
        "dense_refused": refused,
        # The difference of two medians: never below 0.
        "select_ms": max(0.0, choose - times["score_ms"]),
        **times,
        "ratio": dense[best] / times["ours_ms"],
        "attend_ratio": dense[best] / times["attend_ms"],
        "peak_extra_bytes": extra,
    }
