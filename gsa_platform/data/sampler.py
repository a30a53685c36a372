"""Which sequences a rank reads in a step: a pure function, so resuming needs the step alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SequenceSampler:
    """Sequence numbers of each micro-batch, counted from the start of training.

    Micro-batch m of all ranks together is the contiguous range of world * batch_size sequences
    that starts at m * world * batch_size; rank r takes its r-th contiguous slice. So 2 ranks of
    batch b read what 1 rank of batch 2b reads, and accumulating 2 micro-batches of b too.
    """

    batch_size: int
    rank: int = 0
    world: int = 1
    accumulate: int = 1

    def first_micro_batch(self, global_step: int) -> int:
        """Number of the first micro-batch of an optimizer step."""
        return global_step * self.accumulate

    def sequences(self, micro_batch: int) -> range:
        """The sequences of this rank in a micro-batch."""
        start = (micro_batch * self.world + self.rank) * self.batch_size
        return range(start, start + self.batch_size)
