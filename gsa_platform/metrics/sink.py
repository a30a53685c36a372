"""Attention paid to the first position (the sink), beside what uniform attention pays."""

import torch
from torch import Tensor

from gsa_platform.metrics.base import SumMetric, largest, ratio

EARLY_ROWS = 64


class FirstTokenAttention(SumMetric):
    """F-Attn (Qiu et al. 2025, arXiv 2505.06708): attention share of the first token.

    Row 0 is left out: its share is 1 by construction. `early` takes rows 1..63, `tail` the rows
    i >= T/2, where the 1/(i+1) that any attention pays is small. Uniform references are averaged
    over the rows that were fed, so sampled rows are compared like with like. In sparse attention
    an unselected first token counts as 0; `selected` says how often it was selected at all.
    """

    is_differentiable = False
    sums: Tensor
    counts: Tensor
    uniform: Tensor
    selected: Tensor
    selected_rows: Tensor

    def __init__(self, length: int, n_layers: int = 1, **kwargs: object) -> None:
        """length: T, tokens per sequence, which decides the tail."""
        super().__init__(**kwargs)
        self.length = length
        for name in ("sums", "counts", "uniform"):  # columns: all rows, early rows, tail rows
            self.add_sum(name, (n_layers, 3))
        self.add_sum("selected", (n_layers,))
        self.add_sum("selected_rows", (n_layers,))

    def update(
        self, probs: Tensor, rows: Tensor, layer: int = 0, selected: Tensor | None = None
    ) -> None:
        """Add query rows of one layer.

        probs: [..., R] attention probability of each query on position 0 (heads and samples in
        the leading dimensions); rows: int64 [R], or broadcastable to probs, the query's position;
        selected: bool, broadcastable to probs, whether position 0 was selected.
        """
        probs = probs.detach()
        rows = rows.to(probs.device).expand_as(probs)
        groups = (
            rows >= 1,
            (rows >= 1) & (rows < EARLY_ROWS),
            (rows >= 1) & (2 * rows >= self.length),
        )
        even = 1.0 / (rows.double() + 1.0)
        for column, inside in enumerate(groups):
            masked = torch.where(inside, probs, 0.0)
            self.sums[layer, column] += masked.sum(dtype=torch.float64)
            self.counts[layer, column] += inside.sum()
            self.uniform[layer, column] += torch.where(inside, even, 0.0).sum()
        if selected is not None:
            self.selected[layer] += (selected.expand_as(probs) & groups[0]).sum()
            self.selected_rows[layer] += groups[0].sum()

    def compute(self) -> dict[str, Tensor]:
        """Shares in [0, 1], NaN where nothing was fed.

        `layers`, `tail_layers` [n_layers]; over layers `mean`, `max`, `early`, `tail`; the uniform
        references `uniform`, `uniform_early`, `uniform_tail`; `selected` if it was fed.
        """
        shares = ratio(self.sums, self.counts)
        means = shares.nanmean(0)
        even = ratio(self.uniform.sum(0), self.counts.sum(0))
        layers = shares[:, 0]
        result = {
            "layers": layers,
            "tail_layers": shares[:, 2],
            "mean": means[0],
            "max": largest(layers),
            "early": means[1],
            "tail": means[2],
            "uniform": even[0],
            "uniform_early": even[1],
            "uniform_tail": even[2],
        }
        if self.selected_rows.sum() > 0:
            result["selected"] = ratio(self.selected.sum(), self.selected_rows.sum())
        return result
