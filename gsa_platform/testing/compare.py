"""Comparisons that say where two results part and by how much."""

from __future__ import annotations

import torch
from torch import Tensor


def difference(got_BTD: Tensor, want_BTD: Tensor) -> tuple[int, float]:
    """First position at which two results differ at all (-1: nowhere), and the largest
    difference at any position; NaN counts as infinitely far."""
    apart = _apart(got_BTD, want_BTD)
    apart_T = apart.amax(dim=tuple(d for d in range(apart.ndim) if d != 1))
    where = apart_T.nonzero()
    return (int(where[0]) if len(where) else -1), float(apart_T.max()) if apart.numel() else 0.0


def _apart(got: Tensor, want: Tensor) -> Tensor:
    return (got.detach().double() - want.detach().double()).abs().nan_to_num(nan=torch.inf)


def expect_identical(
    got_BTD: Tensor, want_BTD: Tensor, what: str, verdict: str, first: int = 0
) -> None:
    """Raise AssertionError unless both are equal bit by bit. first: position of the first row."""
    position, amount = difference(got_BTD, want_BTD)
    if position >= 0:
        raise AssertionError(
            f"{what} moved the output of position {first + position} by {show(amount)}: {verdict}"
        )


def expect_close(
    got_BTD: Tensor, want_BTD: Tensor, atol: float, what: str, verdict: str, first: int = 0
) -> None:
    """Raise AssertionError unless both agree to `atol`. first: position of the first row."""
    if got_BTD.shape != want_BTD.shape:
        raise AssertionError(
            f"{what} has shape {tuple(got_BTD.shape)}, not {tuple(want_BTD.shape)}: {verdict}"
        )
    apart = _apart(got_BTD, want_BTD)
    if apart.numel() and float(apart.max()) > atol:
        wrong_T = (apart > atol).flatten(2).any(-1).any(0) if apart.ndim > 2 else apart > atol
        position = first + int(wrong_T.reshape(-1).nonzero()[0])
        raise AssertionError(
            f"{what} is {show(float(apart.max()))} off (allowed {atol:g}), from position "
            f"{position} on: {verdict}"
        )


def expect_finite(value: Tensor, what: str) -> None:
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        raise AssertionError(f"{what}: {bad} of {value.numel()} values are not finite")


def show(amount: float) -> str:
    return "an infinite amount (NaN)" if amount == float("inf") else f"{amount:.2g}"
