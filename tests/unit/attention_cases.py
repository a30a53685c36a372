"""Inputs, oracle and error budget shared by the tests of the attention components."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gsa_platform.contracts import LayerDims

NAMES = ("out", "dq", "dk", "dv")
DIMS = LayerDims(64, 4, 2, 16, 128)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def draw(
    queries: int,
    keys: int | None = None,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 16,
    seed: int = 1,
) -> list[Tensor]:
    """q, k, v in float64 on the CPU."""
    g = torch.Generator().manual_seed(seed)
    keys = queries if keys is None else keys
    sizes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    return [torch.randn(batch, n, h, width, generator=g, dtype=torch.float64) for n, h in sizes]


def masked(mask_BHTS: Tensor) -> Attend:
    """Attention by one softmax over T x S."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        mask = mask_BHTS.repeat_interleave(q.shape[2] // mask_BHTS.shape[1], 1).to(q.device)
        logits = torch.einsum("bthe,bshe->bhts", q, k) * q.shape[-1] ** -0.5
        p = logits.masked_fill(~mask, -torch.inf).softmax(-1)
        return torch.einsum("bhts,bshe->bthe", p, v)

    return attend


def run(attend: Attend, tensors: list[Tensor]) -> dict[str, Tensor]:
    """Output and gradients by name."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = attend(*leaves)
    grads = torch.autograd.grad(out.double().sin().sum(), leaves)
    return {n: x.detach() for n, x in zip(NAMES, [out, *grads])}


def assert_same(
    attend: Attend,
    oracle: Attend,
    tensors: list[Tensor],
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
    slack: float = 2,
) -> None:
    """`attend` equals the oracle, output and gradients.

    In float64 to rounding; in less, its error against the oracle in float64 is at most `slack`
    times that of the oracle run in the same precision, plus a few roundings of the largest result
    (a gradient that is zero, as that of a query with one key, is a difference of such numbers).
    """
    low = [x.to(device, dtype) for x in tensors]
    exact = run(oracle, [x.double() for x in low])
    got = run(attend, low)
    reference = run(oracle, low)
    rounding = 4 * torch.finfo(dtype).eps * max(float(x.norm()) for x in exact.values())
    for name, value in exact.items():
        assert got[name].dtype == dtype and torch.isfinite(got[name]).all(), name
        if dtype == torch.float64:
            torch.testing.assert_close(
                got[name], value, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )
            continue
        allowed = slack * float((reference[name].double() - value).norm()) + rounding
        error = float((got[name].double() - value).norm())
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def varlen_oracle(window: int = -1) -> Callable[..., Tensor]:
    """What a varlen kernel computes, from its arguments; window: keys before the query, or all."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
    ) -> Tensor:
        assert cu_q.dtype == cu_k.dtype == torch.int32
        out = []
        for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]):
            n, m = int(b - a), int(d - c)
            assert n <= max_q and m <= max_k
            mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
            mask = mask.triu(m - n - window) if window >= 0 else mask
            out.append(masked(mask[None, None])(q[None, a:b], k[None, c:d], v[None, c:d])[0])
        return torch.cat(out)

    return attend
