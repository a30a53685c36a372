"""Lightning data module that turns text into packed sequences of tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from gsa_platform.data.packing import IGNORED, PackedSequence, PackedStream, Split, split_documents
from gsa_platform.data.sampler import SequenceSampler
from gsa_platform.data.sources import Source, build_source
from gsa_platform.data.store import TokenStore, default_cache_dir, ensure_store
from gsa_platform.data.tokenizers import Tokenizer, build_tokenizer

Batch = dict[str, torch.Tensor]

# Not the run's seed: runs that differ in their seed are compared on the same validation documents.
SPLIT_SEED = 0


def collate(sequences: Sequence[PackedSequence]) -> Batch:
    """Stack sequences into tokens_BT, targets_BT and doc_start_BT, int64."""
    fields = zip(*sequences, strict=True)
    stacked = (torch.from_numpy(np.stack(field)) for field in fields)
    return dict(zip(("tokens_BT", "targets_BT", "doc_start_BT"), stacked, strict=True))


class TrainingBatches(IterableDataset[Batch]):
    """Endless batches of one rank from micro-batch `start` on."""

    def __init__(self, stream: PackedStream, sampler: SequenceSampler) -> None:
        self.stream, self.sampler, self.start = stream, sampler, 0

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        # The loader takes batches from its processes in turn, which keeps the order.
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        micro_batch = self.start + first
        while True:
            yield collate([self.stream[i] for i in self.sampler.sequences(micro_batch)])
            micro_batch += stride


class TrainingLoader(DataLoader[Batch]):
    """Loader whose every new iterator starts at the current optimizer step.

    The position is not saved: Lightning prefetches, so a loader's own count runs ahead of the
    training. It follows from the step, which the checkpoint holds.
    """

    def __init__(
        self, batches: TrainingBatches, position: Callable[[], int], workers: int, pin_memory: bool
    ) -> None:
        super().__init__(batches, batch_size=None, num_workers=workers, pin_memory=pin_memory)
        self._batches, self._position = batches, position

    def __iter__(self) -> Any:
        self._batches.start = self._position()
        return super().__iter__()


class ValidationBatches:
    """The same windows at every validation, `batches` batches on each rank.

    Every window is read by one rank. Where a rank has none left for a batch that others have, it
    gets one row whose targets are all -100, so that ranks take the same number of steps.
    """

    # Not a DataLoader, so that Lightning leaves the sharding alone and still sees a length.
    def __init__(self, stream: PackedStream, sampler: SequenceSampler, batches: int) -> None:
        self.stream, self._sampler = stream, sampler
        per_batch = sampler.batch_size * sampler.world
        self.batches = min(batches, -(-stream.windows_per_epoch // per_batch))

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        for batch in range(self.batches):
            numbers = self._sampler.sequences(batch)
            rows = [self.stream[i] for i in numbers if i < self.stream.windows_per_epoch]
            if not rows:
                filler = self.stream[0]
                rows = [filler._replace(targets_T=np.full_like(filler.targets_T, IGNORED))]
            yield collate(rows)


class TextDataModule(pl.LightningDataModule):
    """Batches of packed text: dict of tokens_BT, targets_BT (-100 = not scored), doc_start_BT.

    Reads data.*, context, seed, and train.batch_size, .accumulate, .val_batches of the resolved
    configuration. The training loader is endless: the number of steps belongs to the trainer.
    Resuming starts at the sequence where the interrupted step began.
    """

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.context = int(cfg.context)
        self.tokenizer: Tokenizer = build_tokenizer(cfg.data.tokenizer)
        self._store: TokenStore | None = None
        self._split: Split | None = None

    @property
    def vocab_size(self) -> int:
        """Number of token ids; needs no data."""
        return self.tokenizer.vocab_size

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token (document beginnings count as tokens), over the whole corpus."""
        return self.store.meta["bytes"] / self.store.meta["tokens"]

    @property
    def store(self) -> TokenStore:
        """The token store, built or opened on first use."""
        if self._store is None:
            self._store = self._open()
        return self._store

    @property
    def split(self) -> Split:
        """Training and validation documents."""
        if self._split is None:
            store, data = self.store, self.cfg.data
            self._split = split_documents(
                store.names, store.offsets, float(data.val_fraction), SPLIT_SEED, self.context
            )
        return self._split

    def source(self) -> Source:
        """The documents; a plugin's data module overrides this."""
        return build_source(self.cfg.data)

    def prepare_data(self) -> None:
        """Build the token store (Lightning calls this on one process of each node)."""
        self._store = self._open()
        if self.split.cut_document is not None:
            print(
                f"the end of {self.split.cut_document} is the validation split: there are too few"
                f" documents for {self.context + 1} tokens each of training and validation",
                file=sys.stderr,
                flush=True,
            )

    def setup(self, stage: str | None = None) -> None:
        """Open the store and split it."""
        _ = self.split

    def train_dataloader(self) -> DataLoader[Batch]:
        """Endless loader, positioned at the trainer's optimizer step."""
        self._align_accumulation()
        sampler = self._sampler()
        stream = self._stream(int(self.cfg.seed), training=True)
        return TrainingLoader(
            TrainingBatches(stream, sampler),
            lambda: sampler.first_micro_batch(self.trainer.global_step if self.trainer else 0),
            workers=int(self.cfg.data.get("workers") or 0),
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> Iterable[Batch]:
        """At most train.val_batches batches per rank; an empty list if there is no validation."""
        if not self.split.validation.tokens:
            return []
        stream = self._stream(SPLIT_SEED, training=False)
        return ValidationBatches(stream, self._sampler(), int(self.cfg.train.val_batches))

    def describe(self) -> dict[str, Any]:
        """Plain values that identify the data: sizes, split, store folder and checksum."""
        store, split, width = self.store, self.split, self.context + 1
        return {
            "source": store.meta["source"],
            "tokenizer": store.meta["tokenizer"],
            "vocab_size": self.vocab_size,
            "documents": store.meta["documents"],
            "tokens": store.meta["tokens"],
            "bytes": store.meta["bytes"],
            "bytes_per_token": self.bytes_per_token,
            "train_documents": len(split.train.lengths),
            "train_tokens": split.train.tokens,
            "train_windows": split.train.tokens // width,
            "val_documents": len(split.validation.lengths),
            "val_tokens": split.validation.tokens,
            "val_windows": split.validation.tokens // width,
            "store": str(store.folder),
            "sha256": store.meta["checksums"]["tokens.bin"],
        }

    def _open(self) -> TokenStore:
        data = self.cfg.data
        cache_dir = data.get("cache_dir")
        folder = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        verify = bool(data.get("verify", False))
        return ensure_store(self.source(), self.tokenizer, folder, verify)

    def _stream(self, seed: int, training: bool) -> PackedStream:
        spans = self.split.train if training else self.split.validation
        cross_document = bool(self.cfg.data.cross_document)
        return PackedStream(self.store, spans, self.context, seed, cross_document)

    def _sampler(self) -> SequenceSampler:
        batch_size, trainer = int(self.cfg.train.batch_size), self.trainer
        if trainer is None:
            return SequenceSampler(batch_size, accumulate=int(self.cfg.train.accumulate))
        rank, world = trainer.global_rank, trainer.world_size
        return SequenceSampler(batch_size, rank, world, trainer.accumulate_grad_batches)

    def _align_accumulation(self) -> None:
        """Make a resumed trainer count micro-batches from the beginning of the optimizer step.

        A checkpoint written between two steps (an exception, Ctrl-C) has lost the gradients of the
        micro-batches already done, but Lightning would count them and step early.
        """
        trainer = self.trainer
        if trainer is None or trainer.accumulate_grad_batches == 1:
            return
        loop = trainer.fit_loop
        progress = loop.epoch_loop.batch_progress
        if not loop.restarting or not progress.total.ready:
            return
        done: Any = progress.total
        # Lightning counts a checkpoint's own batch as completed when it starts again.
        saved_at_batch_end = done.ready == done.started == done.processed == done.completed + 1
        wanted = trainer.global_step * trainer.accumulate_grad_batches
        surplus = done.completed + int(saved_at_batch_end) - wanted
        if abs(surplus) < trainer.accumulate_grad_batches:
            progress.current.completed -= surplus
