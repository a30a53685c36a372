"""Cross entropy of a vocabulary projection, computed in chunks of tokens.

The logits of a chunk are the only thing with a vocabulary dimension per token: at 131072 tokens
and 50k words they would be 26 GB in float32. Gradients are formed chunk by chunk in the forward
pass (the idea of Liger-Kernel's fused linear cross entropy), which needs three matrix products
where recomputing the logits in the backward pass would need four.

Shapes: N tokens, D model width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_LOW = (torch.bfloat16, torch.float16)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def _matmul_accumulate(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """a @ b in `out_dtype`; on CUDA the low-precision product keeps its float32 accumulator."""
    if a.dtype == out_dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out_dtype)
    return (a @ b).to(out_dtype)


def _shifted_logits(
    hidden: Tensor, weight_DV: Tensor, targets: Tensor, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits minus their row maximum, the shifted target logit [n,1], target index and mask."""
    logits = _matmul_accumulate(hidden, weight_DV, dtype)
    logits -= logits.amax(-1, keepdim=True)
    scored = (targets != ignore_index)[:, None]
    index = torch.where(scored, targets[:, None], 0)
    return logits, logits.gather(-1, index), index, scored


def _loss_and_gradients(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    chunk: int,
    ignore_index: int,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    low = _compute_dtype(hidden_ND)
    high = torch.float32 if low in _LOW else low
    with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
        weight = weight_VD.to(low)
        nll_sum = torch.zeros((), dtype=high, device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND) if want_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=high) if want_weight else None
        for start in range(0, hidden_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            hidden = hidden_ND[rows].to(low)
            probs, target, index, scored = _shifted_logits(
                hidden, weight.t(), targets_N[rows], ignore_index, high
            )
            norm = probs.exp_().sum(-1, keepdim=True)
            nll_sum += torch.where(scored, norm.log() - target, 0.0).sum()
            if want_hidden or want_weight:
                probs.div_(norm).scatter_add_(-1, index, torch.full_like(target, -1.0))
                grad_logits = probs.masked_fill_(~scored, 0.0).to(low)
                if grad_hidden is not None:
                    grad_hidden[rows] = grad_logits @ weight
                if grad_weight is not None and low == high:
                    grad_weight.addmm_(grad_logits.t(), hidden)
                elif grad_weight is not None:
                    grad_weight += _matmul_accumulate(grad_logits.t(), hidden, high)
                del grad_logits
            del probs  # or it would still be held while the next chunk's logits are made
        return nll_sum, grad_hidden, grad_weight


def _scaled(grad_hidden: Tensor, scale: Tensor, chunk: int) -> Tensor:
    """grad_hidden * scale; a low-precision product would round a scale of 1/n_tokens first."""
    if grad_hidden.dtype not in _LOW:
        return grad_hidden * scale
    out = torch.empty_like(grad_hidden)
    for start in range(0, out.shape[0], chunk):
        rows = slice(start, start + chunk)
        out[rows] = grad_hidden[rows].float() * scale
    return out


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, ignore_index: int
    ) -> Tensor:
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        nll_sum, grad_hidden, grad_weight = _loss_and_gradients(
            hidden, weight, targets, chunk, ignore_index, want_hidden, want_weight
        )
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.chunk = chunk
        return nll_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = _scaled(grad_hidden, grad, ctx.chunk)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def chunked_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of `hidden @ weight.T` and the number of scored tokens.

    hidden_ND: hidden states; weight_VD: output embedding; targets_N: int64, `ignore_index` where
    a token is not scored; chunk: tokens per chunk (chunk * V logits are held at once).
    Returns (nll_sum, n_tokens): nats, float32 or better and differentiable; int64, on the device.
    With no scored token the sum and all gradients are 0. Products run in the autocast dtype if
    autocast is on; softmax and sums in float32 (float64 for float64 inputs).
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    n_tokens = (targets_N != ignore_index).sum()
    needs_grad = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    if needs_grad:
        apply = cast(Callable[..., Tensor], _ChunkedCrossEntropy.apply)
        nll_sum = apply(hidden_ND, weight_VD, targets_N, chunk, ignore_index)
    else:
        nll_sum, _, _ = _loss_and_gradients(
            hidden_ND, weight_VD, targets_N, chunk, ignore_index, False, False
        )
    return nll_sum, n_tokens


@torch.no_grad()
def chunked_nll(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int, ignore_index: int = -100
) -> Tensor:
    """Negative log likelihood of each target [N] in nats (0 where ignored), without gradient."""
    low = _compute_dtype(hidden_ND)
    high = torch.float32 if low in _LOW else low
    nll = torch.zeros(hidden_ND.shape[0], dtype=high, device=hidden_ND.device)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        weight = weight_VD.to(low)
        for start in range(0, hidden_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits, target, _, scored = _shifted_logits(
                hidden_ND[rows].to(low), weight.t(), targets_N[rows], ignore_index, high
            )
            per_token = logits.exp_().sum(-1, keepdim=True).log() - target
            nll[rows] = torch.where(scored, per_token, 0.0).squeeze(-1)
    return nll
