"""Correctness before speed: the path that is about to be timed, against float64."""

from dataclasses import replace

import torch
from torch import Tensor

from gsa_kernels.select import select
from gsa_kernels.selection import Selection
from gsa_kernels.sparse_attention import sparse_attention

from .case import Case

ALLOWED = 2.0  # times the error of the same formula in the same precision
_LEAST_OVERLAP = 0.98  # scores that tie to 12 bits may be chosen either way


def wrong(case: Case, backward: bool = True) -> tuple[dict[str, float], list[str]]:
    """(error of out, dq, dk, dv over the low-precision error, overlap of the selection with the
    oracle's), and what of it is out of bounds, in words. backward: with gradients, else in the way
    that decoding goes."""
    selection = case.choose()
    found = errors(case, selection, backward)
    found["selection"] = overlap(case, selection)
    problems = [
        f"{name} is wrong by {value:.1f} x the error of its precision ({ALLOWED:g} are allowed)"
        for name, value in found.items()
        if name != "selection" and not value <= ALLOWED
    ]
    if not found["selection"] >= _LEAST_OVERLAP:
        problems.append(f"the selection agrees with the oracle's in {found['selection']:.1%}")
    return found, problems


def errors(case: Case, selection: Selection, backward: bool) -> dict[str, float]:
    """Error of each tensor against float64, as a multiple of the oracle's own in low precision."""
    results: dict[str, list[Tensor]] = {}
    for name, impl, dtype in (
        ("exact", "reference", torch.float64),
        ("low", "reference", case.q.dtype),
        ("got", case.impl, case.q.dtype),
    ):
        inputs = (case.q, case.k, case.gated_values)
        q, k, v = (x.detach().to(dtype).requires_grad_(backward) for x in inputs)
        with torch.set_grad_enabled(backward):
            out = sparse_attention(q, k, v, selection, impl=impl).out_BTHE
            loss = out.double().sin().sum()
        grads = torch.autograd.grad(loss, (q, k, v)) if backward else ()
        results[name] = [x.detach().double() for x in (out, *grads)]
    found = {}
    for i, name in enumerate(("out", "dq", "dk", "dv")[: len(results["exact"])]):
        exact = results["exact"][i]
        # Two roundings of float32 are no error: eager and reference add in another order.
        floor = 4 * torch.finfo(torch.float32).eps * exact.norm()
        error = (results["got"][i] - exact).norm()
        found[name] = float(error / ((results["low"][i] - exact).norm() + floor))
    return found


def overlap(case: Case, selection: Selection) -> float:
    """Share of the oracle's blocks that the selection has; both score in float32 or wider."""
    f = case.factors
    bias = None if f.bias_J is None else f.bias_J.detach().float().cpu()
    parts = {n: getattr(f, n).detach().float().cpu() for n in ("q_BTJI", "k_BSI", "weight_BTJ")}
    factors = replace(f, bias_J=bias, **parts)
    n = case.q.shape[1]
    exact = select(factors, case.spec, case.budget, case.budget, n, impl="reference").selection
    return recall(selection.blocks_BHQN.cpu(), exact.blocks_BHQN)


def recall(got_BHQN: Tensor, wanted_BHQN: Tensor) -> float:
    """Share of the wanted blocks that were got, both ascending with -1 at the end; 1 if none were
    wanted."""
    valid = wanted_BHQN >= 0
    if not bool(valid.any()):
        return 1.0
    if got_BHQN.shape[-1] == 0:
        return 0.0
    last = torch.iinfo(got_BHQN.dtype).max
    got = got_BHQN.masked_fill(got_BHQN < 0, last)
    place = torch.searchsorted(got, wanted_BHQN.contiguous()).clamp_max(got.shape[-1] - 1)
    hit = (got.gather(-1, place) == wanted_BHQN) & valid
    return float(hit.sum()) / float(valid.sum())
