"""Splitting and packing: borders, coverage, purity and errors."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from gsa_platform.data.packing import PackedStream, Spans, split_documents
from gsa_platform.data.sampler import SequenceSampler
from gsa_platform.errors import UserError

BOS = 1000


def corpus(lengths: list[int]) -> tuple[SimpleNamespace, np.ndarray, list[str]]:
    """Documents whose tokens are BOS + document number, then running numbers within the corpus."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(offsets[-1])
    tokens[offsets[:-1]] = BOS + np.arange(len(lengths))
    names = [f"d{i}" for i in range(len(lengths))]
    return SimpleNamespace(tokens=tokens), offsets, names


def stream(lengths: list[int], context: int, cross: bool = False, seed: int = 0) -> PackedStream:
    store, offsets, _ = corpus(lengths)
    return PackedStream(store, Spans(offsets[:-1], np.diff(offsets)), context, seed, cross)


def starts(spans: Spans) -> set[int]:
    return set(spans.starts.tolist())


def test_split_is_by_document_and_complete() -> None:
    _, offsets, names = corpus([50] * 200)
    split = split_documents(names, offsets, 0.2, 0, 16)
    assert starts(split.train).isdisjoint(starts(split.validation))
    assert starts(split.train) | starts(split.validation) == set(offsets[:-1].tolist())
    assert 0.1 < split.validation.tokens / offsets[-1] < 0.3
    assert split.cut_document is None
    again = split_documents(names, offsets, 0.2, 0, 16)
    assert starts(again.validation) == starts(split.validation)
    other = split_documents(names, offsets, 0.2, 1, 16)
    assert starts(other.validation) != starts(split.validation)


def test_split_does_not_change_side_with_the_corpus_order() -> None:
    _, offsets, names = corpus([50] * 100)
    split = split_documents(names, offsets, 0.3, 0, 16)
    backwards = split_documents(names[::-1], offsets, 0.3, 0, 16)
    chosen = {names[i] for i in split.validation.starts // 50}
    assert {names[::-1][i] for i in backwards.validation.starts // 50} == chosen


@pytest.mark.parametrize("fraction", [0.0001, 0.5, 0.9999])
@pytest.mark.parametrize("context", [9, 99, 129])
def test_both_sides_hold_a_sequence_of_whole_documents(fraction: float, context: int) -> None:
    _, offsets, names = corpus([30, 5, 60, 5, 100, 40, 20, 40])
    split = split_documents(names, offsets, fraction, 0, context)
    assert split.cut_document is None
    assert min(split.train.tokens, split.validation.tokens) >= context + 1
    assert starts(split.train) | starts(split.validation) == set(offsets[:-1].tolist())
    assert split.train.tokens + split.validation.tokens == offsets[-1]


def test_a_single_document_is_cut_at_its_end() -> None:
    _, offsets, names = corpus([1000])
    split = split_documents(names, offsets, 0.05, 0, 99)
    assert split.cut_document == "d0"
    assert split.train.starts.tolist() == [0] and split.train.lengths.tolist() == [900]
    assert split.validation.starts.tolist() == [900]
    assert split.validation.lengths.tolist() == [100]
    assert split_documents(names, offsets, 0.3, 0, 99).validation.tokens == 300


def test_fraction_zero_has_no_validation() -> None:
    _, offsets, names = corpus([30, 30])
    split = split_documents(names, offsets, 0, 0, 59)
    assert split.train.tokens == 60 and split.validation.tokens == 0


@pytest.mark.parametrize("lengths, context", [([30, 30], 30), ([20, 20, 20], 29), ([59], 29)])
def test_context_longer_than_the_data(lengths: list[int], context: int) -> None:
    _, offsets, names = corpus(lengths)
    with pytest.raises(UserError, match=f"context {context} is longer than the data") as error:
        split_documents(names, offsets, 0.05, 0, context)
    assert str(sum(lengths)) in str(error.value) and "context=" in str(error.value)


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_fraction_out_of_range(fraction: float) -> None:
    _, offsets, names = corpus([30, 30])
    with pytest.raises(UserError, match="val_fraction"):
        split_documents(names, offsets, fraction, 0, 9)


LENGTHS = [3, 1, 7, 40, 2, 5, 11, 1, 30]


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_windows_of_an_epoch_are_disjoint_and_nearly_complete(epoch: int) -> None:
    packed = stream(LENGTHS, context=8)
    seen = []
    for index in range(packed.windows_per_epoch):
        for start, stop in packed.pieces(epoch, index):
            seen += range(start, stop)
    assert packed.windows_per_epoch == sum(LENGTHS) // 9
    assert len(seen) == len(set(seen)) == 9 * packed.windows_per_epoch


def test_windows_are_pure_functions_of_seed_epoch_index() -> None:
    one, two = stream(LENGTHS, 8, seed=3), stream(LENGTHS, 8, seed=3)
    order = [40, 3, 0, 23, 11, 12, 40]
    by_two = {i: two[i] for i in reversed(order)}
    for i in order:
        for left, right in zip(one[i], by_two[i], strict=True):
            np.testing.assert_array_equal(left, right)
    epochs = {tuple(one.sequence(e, 0).tokens_T.tolist()) for e in range(8)}
    seeds = {tuple(stream(LENGTHS, 8, seed=s)[0].tokens_T.tolist()) for s in range(-2, 6)}
    assert len(epochs) > 4 and len(seeds) > 4
    copy = pickle.loads(pickle.dumps(one))
    np.testing.assert_array_equal(copy[11].tokens_T, one[11].tokens_T)


@pytest.mark.parametrize("context", [4, 8, 33, 98])
def test_document_starts_and_targets_at_borders(context: int) -> None:
    packed = stream(LENGTHS, context)
    borders = 0
    for number in range(3 * packed.windows_per_epoch):
        tokens, targets, doc_start = packed[number]
        pieces = packed.pieces(*divmod(number, packed.windows_per_epoch))
        window = np.concatenate([packed.store.tokens[a:b] for a, b in pieces])
        np.testing.assert_array_equal(tokens, window[:-1])
        start = 0
        for t in range(context):
            if tokens[t] >= BOS:
                start = t
            assert doc_start[t] == start
            if window[t + 1] >= BOS:
                assert targets[t] == -100
                borders += 1
            else:
                assert targets[t] == window[t + 1] == tokens[t] + 1 or tokens[t] >= BOS
    assert borders > 5


def test_cross_document_scores_every_token() -> None:
    packed = stream(LENGTHS, 33, cross=True)
    for number in range(6):
        tokens, targets, doc_start = packed[number]
        assert not doc_start.any()
        np.testing.assert_array_equal(targets[:-1], tokens[1:])
        assert (targets >= 0).all()


def test_a_window_can_be_the_whole_circle() -> None:
    packed = stream([4, 3, 3], context=9)
    assert packed.windows_per_epoch == 1
    assert sum(b - a for a, b in packed.pieces(2, 0)) == 10


@pytest.mark.parametrize("world, batch, accumulate", [(2, 2, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2)])
def test_ranks_and_accumulation_read_the_same_global_batch(
    world: int, batch: int, accumulate: int
) -> None:
    one = SequenceSampler(batch_size=4)
    for step in (0, 1, 17):
        ranks = [SequenceSampler(batch, rank, world, accumulate) for rank in range(world)]
        first = ranks[0].first_micro_batch(step)
        found = [
            sequence
            for micro_batch in range(first, first + accumulate)
            for rank in ranks
            for sequence in rank.sequences(micro_batch)
        ]
        assert found == list(one.sequences(one.first_micro_batch(step)))
