"""Splits documents into training and validation, and packs a split into sequences.

A split is a circular stream of its documents in a shuffled order, cut into windows of context + 1
tokens. Window `index` of epoch `epoch` depends on (seed, epoch, index) alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from gsa_platform.data.tokenizers import Tokens
from gsa_platform.errors import UserError

Ints = npt.NDArray[np.int64]
IGNORED = -100


@dataclass(frozen=True)
class Spans:
    """The documents of a split: first token of each in the store, and number of tokens."""

    starts: Ints
    lengths: Ints

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())


@dataclass(frozen=True)
class Split:
    """Training and validation documents; `cut_document` is the one that both share, if any."""

    train: Spans
    validation: Spans
    cut_document: str | None = None


def split_documents(
    names: Sequence[str], offsets: Ints, val_fraction: float, seed: int, context: int
) -> Split:
    """Assign whole documents to training or validation by a hash of their name and the seed.

    Both sides get at least context + 1 tokens: where the hash gives less, whole documents move in
    the order of their hash. If no move of whole documents suffices (a corpus of one document), the
    end of the longest one becomes the validation split. With val_fraction 0 there is none.

    Raises UserError if val_fraction is outside [0, 1) or the data is too short for the context.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(f"data.val_fraction={val_fraction} must be at least 0 and below 1.")
    starts, lengths = offsets[:-1], np.diff(offsets)
    total, need = int(offsets[-1]), context + 1
    splits = 2 if val_fraction else 1
    if total < splits * need:
        raise _too_long(context, total, len(names), splits)
    if not val_fraction:
        return Split(Spans(starts, lengths), Spans(starts[:0], lengths[:0]))

    ranks = np.asarray([_hash(name, seed) for name in names])
    validation = ranks < val_fraction
    order = np.argsort(ranks, kind="stable")
    for poor, candidates in ((True, order), (False, order[::-1])):
        missing = need - int(lengths[validation == poor].sum())
        spare = int(lengths[validation != poor].sum()) - need
        for document in candidates:
            if missing <= 0:
                break
            if validation[document] != poor and lengths[document] <= spare:
                validation[document] = poor
                missing -= lengths[document]
                spare -= lengths[document]
        if missing > 0:
            return _cut_longest(names, starts, lengths, val_fraction, context)
    train = Spans(starts[~validation], lengths[~validation])
    return Split(train, Spans(starts[validation], lengths[validation]))


def _cut_longest(
    names: Sequence[str], starts: Ints, lengths: Ints, val_fraction: float, context: int
) -> Split:
    total, need = int(lengths.sum()), context + 1
    longest = int(np.argmax(lengths))
    tail = min(max(need, round(val_fraction * total)), total - need)
    if tail >= lengths[longest]:
        raise _too_long(context, total, len(names), 2)
    front = lengths.copy()
    front[longest] -= tail
    end = Spans(starts[[longest]] + front[longest], np.asarray([tail]))
    return Split(Spans(starts, front), end, names[longest])


def _too_long(context: int, tokens: int, documents: int, splits: int) -> UserError:
    sides = "training and validation need" if splits == 2 else "training needs"
    return UserError(
        f"context {context} is longer than the data: {tokens} tokens in {documents} document(s),"
        f" and {sides} at least {context + 1} tokens{' each' if splits == 2 else ''}, in whole"
        " documents. Use more text (data.paths=, data.max_bytes=0) or a shorter context=."
    )


def _hash(name: str, seed: int) -> float:
    """Uniform in [0, 1); the same on every machine, unlike hash()."""
    raw = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return (int.from_bytes(raw, "little") >> 11) / 2**53


class PackedSequence(NamedTuple):
    """One sequence; int64 arrays of length context."""

    tokens_T: Ints
    targets_T: Ints
    doc_start_T: Ints


class HasTokens(Protocol):
    """Anything that holds token ids in one array, such as a TokenStore."""

    tokens: Tokens


class _Order(NamedTuple):
    """How an epoch arranges the stream."""

    documents: Ints
    ends: Ints
    offset: int
    windows: Ints


class PackedStream:
    """Sequences of one split: pure functions of (seed, epoch, index).

    Each epoch shuffles the documents, starts the cut at a random offset of the circular stream,
    and shuffles the windows. Targets are the next tokens. With cross_document=False, doc_start_T
    holds the position where the document of each position begins (0 if it began before the
    sequence), and a target that is the first token of another document is -100; otherwise
    doc_start_T is all 0.

    The tokens may be a memory map; only the pieces of a requested window are read.
    """

    def __init__(
        self, store: HasTokens, spans: Spans, context: int, seed: int, cross_document: bool
    ) -> None:
        self.store, self.spans, self.context = store, spans, context
        self.seed, self.cross_document = seed, cross_document
        self.windows_per_epoch = spans.tokens // (context + 1)
        self._orders: dict[int, _Order] = {}

    def __getitem__(self, sequence: int) -> PackedSequence:
        """Sequence number `sequence` (>= 0) of the endless stream of epochs."""
        return self.sequence(*divmod(sequence, self.windows_per_epoch))

    def sequence(self, epoch: int, index: int) -> PackedSequence:
        """Window `index` of an epoch."""
        window = np.empty(self.context + 1, dtype=np.int64)
        doc_start_T = np.zeros(self.context, dtype=np.int64)
        targets_T = window[1:]
        if not self.cross_document:
            targets_T = targets_T.copy()
        filled = 0
        for start, stop in self.pieces(epoch, index):
            end = filled + stop - start
            window[filled:end] = self.store.tokens[start:stop]
            if not self.cross_document:
                doc_start_T[filled:end] = filled
                targets_T[max(filled - 1, 0) : end - 1] = window[max(filled, 1) : end]
                if filled:
                    targets_T[filled - 1] = IGNORED
            filled = end
        return PackedSequence(window[:-1], targets_T, doc_start_T)

    def pieces(self, epoch: int, index: int) -> list[tuple[int, int]]:
        """The token ranges of the store that make a window, each inside one document."""
        order = self._order(epoch)
        width, total = self.context + 1, int(order.ends[-1])
        position = (order.offset + int(order.windows[index]) * width) % total
        slot = int(np.searchsorted(order.ends, position, side="right"))
        found = []
        while width:
            take = min(width, int(order.ends[slot]) - position)
            document = order.documents[slot]
            length = int(self.spans.lengths[document])
            start = int(self.spans.starts[document]) + length - (int(order.ends[slot]) - position)
            found.append((start, start + take))
            width -= take
            position += take
            if position == order.ends[slot]:
                slot += 1
            if position == total:
                position = slot = 0
        return found

    def _order(self, epoch: int) -> _Order:
        if epoch not in self._orders:
            # A batch can straddle two epochs, so the previous order stays.
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            random = np.random.default_rng([self.seed % 2**64, epoch])
            documents = random.permutation(len(self.spans.lengths))
            ends = np.cumsum(self.spans.lengths[documents])
            offset = int(random.integers(ends[-1]))
            windows = random.permutation(self.windows_per_epoch)
            self._orders[epoch] = _Order(documents, ends, offset, windows)
        return self._orders[epoch]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_orders": {}}
