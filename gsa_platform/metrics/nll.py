"""Negative log likelihood per token: overall (perplexity) and by position in the context."""

import math

import torch
from torch import Tensor

from gsa_platform.metrics.base import SumMetric, ratio


class TokenNLL(SumMetric):
    """Token-weighted mean negative log likelihood in nats per token.

    Fed with sums, so that no batch of probabilities is ever built and batches with few scored
    tokens weigh little. `compute` is NaN before the first token.
    """

    is_differentiable = False
    higher_is_better = False
    nll_sum: Tensor
    n_tokens: Tensor

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.add_sum("nll_sum")
        self.add_sum("n_tokens", dtype=torch.int64)

    def update(self, nll_sum: Tensor | float, n_tokens: Tensor | int) -> None:
        """Add the summed NLL (nats) of `n_tokens` scored tokens."""
        self.nll_sum += nll_sum.detach().double() if isinstance(nll_sum, Tensor) else nll_sum
        self.n_tokens += n_tokens

    def compute(self) -> Tensor:
        """Mean NLL in nats per token, float64 scalar."""
        return ratio(self.nll_sum, self.n_tokens)

    def perplexity(self) -> Tensor:
        """exp of the mean NLL."""
        return self.compute().exp()

    def bits_per_byte(self, bytes_per_token: float) -> Tensor:
        """Mean NLL in bits per byte of text; comparable across tokenizers."""
        return self.compute() / (math.log(2.0) * bytes_per_token)


class PositionNLL(SumMetric):
    """Mean NLL by position: bucket k covers positions [2^k, 2^(k+1)); bucket 0 also position 0.

    Late buckets show whether a model uses its long context.
    """

    is_differentiable = False
    nll_sum: Tensor
    n_tokens: Tensor
    edges: Tensor

    def __init__(self, context: int, **kwargs: object) -> None:
        """context: tokens per sequence; positions run from 0 to context - 1."""
        super().__init__(**kwargs)
        n_buckets = max(1, (context - 1).bit_length())
        self.buckets: list[tuple[int, int]] = [
            (0 if k == 0 else 2**k, min(2 ** (k + 1), context)) for k in range(n_buckets)
        ]
        edges = torch.tensor([2**k for k in range(1, n_buckets)], dtype=torch.int64)
        self.register_buffer("edges", edges, persistent=False)
        self.add_sum("nll_sum", (n_buckets,))
        self.add_sum("n_tokens", (n_buckets,), torch.int64)

    def update(self, nll: Tensor, positions: Tensor, scored: Tensor | None = None) -> None:
        """Add tokens.

        nll: [..., T] nats per token; positions: int64, broadcastable to nll; scored: bool,
        broadcastable to nll, False where the token does not count (default: all count).
        """
        bucket = torch.bucketize(positions, self.edges, right=True).expand_as(nll)
        counted = torch.ones_like(bucket) if scored is None else scored.to(bucket).expand_as(nll)
        values = torch.where(counted.bool(), nll.detach().double(), 0.0)
        self.nll_sum += torch.zeros_like(self.nll_sum).index_add_(
            0, bucket.reshape(-1), values.reshape(-1)
        )
        self.n_tokens += torch.zeros_like(self.n_tokens).index_add_(
            0, bucket.reshape(-1), counted.reshape(-1)
        )

    def compute(self) -> Tensor:
        """Mean NLL per bucket [n_buckets] in nats; NaN for an empty bucket. See `buckets`."""
        return ratio(self.nll_sum, self.n_tokens)
