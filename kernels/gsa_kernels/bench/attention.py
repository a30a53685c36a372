"""Records of one layer's attention: the whole path and its parts, beside the fastest dense one.

What is timed: scoring, selection, value gate, attention and output gate (the projections of the
indexer and of q, k, v are not); with the backward also the KL objective on the selected keys.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gsa_kernels.selection import Selection
from gsa_kernels.sparse_attention import sparse_attention, triton_config
from gsa_kernels.sparse_attention.api import choose

from .case import Case, Shape
from .dense import Attend, dense_times
from .timing import (
    graph_milliseconds,
    host_milliseconds,
    peak_bytes,
    turns_milliseconds,
)
from .work import Rates, shares, work

# What a record says of pairs computed and rows fetched, where neighbours unite their lists.
OF_UNIONS = (
    "flops_computed", "inflation", "bytes_gathered", "flops_computed_share", "gathered_share"
)  # fmt: skip


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

    score_ms and select_ms are those of the forward: neither has a backward but the KL's. Where
    single keys of long rows are chosen as they are scored, select_ms holds both.
    """
    backward, device = name == "forward_backward", case.q.device
    cases = [c.learn() if backward else c for c in case.copies()]
    chosen = [c.choose() for c in cases]
    values = [c.gated_values.detach().requires_grad_(backward) for c in cases]
    dout = torch.randn_like(case.q)

    def attention(i: int) -> Any:
        c, v = cases[i], values[i]
        out = sparse_attention(c.q, c.k, v, chosen[i], impl=c.impl).out_BTHE
        return torch.autograd.grad(out, (c.q, c.k, v), dout) if backward else out

    def whole(i: int) -> Any:
        return cases[i].train(dout) if backward else cases[i].forward()

    with torch.set_grad_enabled(backward):
        times = _times(cases, attention, whole, device, budget_s)
        extra = peak_bytes(partial(whole, 0), device)
        alone = peak_bytes(partial(attention, 0), device)
        gradients = _backward_bytes(cases[0], values[0], chosen[0], dout) if backward else None
    tensors = [(c.q, c.k, v) for c, v in zip(cases, values, strict=True)]
    found, refused = dense_times(tensors, dense, backward, others, budget_s)
    record = _record(shape, name, times, found, refused, extra)
    counted = work(chosen[0], shape.heads, shape.kv_heads)
    record["keys_attended"] = counted.pairs / (shape.heads * shape.seq_len * shape.batch)
    record["attend_extra_bytes"] = alone
    if gradients is not None:
        record["backward_extra_bytes"] = gradients
    row = record | shares(case.q, case.k, counted, backward, times["attend_ms"], rates)
    if _gathers(case, chosen[0]):
        for field in OF_UNIONS:
            row.pop(field)
    return row


def _gathers(case: Case, selection: Selection) -> bool:
    """Whether far choices are gathered by key block, so that pairs and bytes are not those of
    unions: how many they are only the device knows."""
    name, _ = choose(case.impl, case.q.device, case.spec, case.q.shape[3])
    return name == "triton" and triton_config.gather(case.q, case.k, selection) is not None


def _backward_bytes(case: Case, v: Tensor, selection: Selection, dout: Tensor) -> int:
    """What the attention's backward allocates at its peak, the gradients included."""
    out = sparse_attention(case.q, case.k, v, selection, impl=case.impl).out_BTHE
    leaves = (case.q, case.k, v)
    return peak_bytes(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True), v.device)


def _times(
    cases: list[Case],
    attention: Callable[[int], Any],
    whole: Callable[[int], Any],
    device: torch.device,
    budget_s: float,
) -> dict[str, float]:
    """Milliseconds of the parts, the cases taking turns; host_ms: of the host, for the whole."""

    def of(calls: Iterable[Callable[[], Any]]) -> float:
        return turns_milliseconds(list(calls), device, budget_s)

    turns = range(len(cases))
    return {
        "score_ms": of(c.score for c in cases),
        "choose_ms": of(c.choose for c in cases),
        "attend_ms": of(partial(attention, i) for i in turns),
        "ours_ms": of(partial(whole, i) for i in turns),
        "host_ms": host_milliseconds(partial(whole, 0), device),
    }


def decode_record(
    shape: Shape,
    case: Case,
    dense: list[str],
    rates: Rates,
    others: dict[str, Attend] | None = None,
    budget_s: float = 1.0,
) -> dict[str, Any]:
    """One record of single queries against a cache, which take turns so that the keys they choose
    are not in the L2 cache yet.

    case: the cache and a few queries of it. ours_ms is a step that scores the whole cache and
    chooses anew. In tile mode this happens at one step of R; reuse_ms is the others', which go on
    with the tile's choice. graph_ms and dense_graph_ms: of CUDA graphs, without the host.
    """
    device, r = case.q.device, shape.spec.query_tile
    assert (case.k.shape[1] - 1) % r == 0, "the query must begin a tile"
    with torch.no_grad():
        held = case.copies()
        cases = [held[i % len(held)].query(i) for i in range(case.q.shape[1])]
        chosen = [c.choose() for c in cases]

        def attention(i: int) -> Tensor:
            c = cases[i]
            return sparse_attention(c.q, c.k, c.v, chosen[i], impl=c.impl).out_BTHE

        times = _times(cases, attention, lambda i: cases[i].forward(), device, budget_s)
        times["graph_ms"] = graph_milliseconds([c.forward for c in cases], device, budget_s)
        if r > 1:
            again = [partial(c.attend, s) for c, s in zip(cases, chosen, strict=True)]
            times["reuse_ms"] = turns_milliseconds(again, device, budget_s)
        extra = peak_bytes(cases[0].forward, device)
        alone = peak_bytes(partial(attention, 0), device)
    tensors = [(c.q, c.k, c.v) for c in cases[: len(held)]]
    found, refused = dense_times(tensors, dense, False, others, budget_s)
    record = _record(shape, "decode", times, found, refused, extra)
    if times["graph_ms"]:
        graphs, _ = dense_times(tensors, list(found), False, others, budget_s, graph_milliseconds)
        captured = [ms for ms in graphs.values() if ms]
        if captured:
            record["dense_graph_ms"] = min(captured)
            record["graph_ratio"] = min(captured) / times["graph_ms"]
    if r > 1:
        mean = (times["ours_ms"] + (r - 1) * times["reuse_ms"]) / r
        record["ratio_mean_step"] = record["dense_ms"] / mean
    counted = work(chosen[0], shape.heads, shape.kv_heads)
    record["attend_extra_bytes"] = alone
    record["cache_keys"] = case.k.shape[1] - 1
    record["keys_attended"] = counted.pairs / (shape.heads * shape.batch)
    q, read = cases[0].q, _read(case.k, counted)
    return record | shares(q, read, counted, False, times["attend_ms"], rates)


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
