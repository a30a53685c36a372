"""Documents inside a batch of sequences as runs laid end to end, as varlen kernels take them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from gsa_platform.contracts import Sequence


class Run(NamedTuple):
    """Queries low .. stop-1 of sequence `row`, which attend to its keys first .. stop-1."""

    row: int
    first: int
    low: int
    stop: int


def runs(seq: Sequence, batch: int, queries: int) -> list[Run]:
    """One run for each document that has queries, by sequence and position.

    Every query is in one run. Without documents a sequence is one run. Waits for the device.
    """
    stop = seq.q_start + queries
    if seq.doc_start_BS is None:
        return [Run(b, 0, seq.q_start, stop) for b in range(batch)]
    docs = seq.doc_start_BS[:, :stop]
    begins = (docs == torch.arange(stop, device=docs.device)).nonzero().tolist()
    found = []
    for (row, first), (next_row, next_first) in zip(begins, [*begins[1:], (-1, 0)]):
        end = next_first if next_row == row else stop
        if end > seq.q_start:
            found.append(Run(row, first, max(first, seq.q_start), end))
    return found


@dataclass(frozen=True)
class Packed:
    """q_NHE, k_MKE, v_MKE: the runs of all sequences, one after another."""

    q_NHE: Tensor
    k_MKE: Tensor
    v_MKE: Tensor
    runs: list[Run]

    @cached_property
    def q_lengths(self) -> list[int]:
        return [run.stop - run.low for run in self.runs]

    @cached_property
    def k_lengths(self) -> list[int]:
        return [run.stop - run.first for run in self.runs]

    def cumulative(self, lengths: list[int]) -> Tensor:
        """int32 [runs + 1] offsets of the runs."""
        total = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        return total.to(self.q_NHE.device)

    def each(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """out_NHE, one call of `attend` (with a batch dimension of 1) per run."""
        # split, not slices: the gradient of a slice is as large as the whole tensor.
        q = self.q_NHE.split(self.q_lengths)
        k, v = (x.split(self.k_lengths) for x in (self.k_MKE, self.v_MKE))
        parts = zip(q, k, v, strict=True)
        return torch.cat([attend(a[None], b[None], c[None])[0] for a, b, c in parts])


def pack(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, seq: Sequence) -> Packed:
    """Lay the runs of a batch end to end; out_NHE.unflatten(0, (B, T)) is the way back."""
    batch, queries = q_BTHE.shape[:2]
    found = runs(seq, batch, queries)
    k, v = (x[:, : seq.q_start + queries] for x in (k_BSKE, v_BSKE))
    if seq.q_start:  # documents that ended before the first query have no run
        k, v = (torch.cat([x[r.row, r.first : r.stop] for r in found]) for x in (k, v))
    else:
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    return Packed(q_BTHE.flatten(0, 1), k, v, found)
