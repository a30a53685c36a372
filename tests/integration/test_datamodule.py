"""The data module inside Lightning: ranks, resuming in mid-epoch, accumulation, validation."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf

from gsa_platform.data.datamodule import TextDataModule
from gsa_platform.errors import UserError

CONTEXT = 32


@pytest.fixture
def cfg(tmp_path: Path) -> DictConfig:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(
            "".join(chr(97 + (i + j) % 26) for j in range(20 + 3 * i))
        )
    return OmegaConf.create(
        {
            "seed": 1,
            "context": CONTEXT,
            "data": {
                "name": "text",
                "paths": [str(folder)],
                "tokenizer": "bytes",
                "val_fraction": 0.2,
                "cross_document": False,
                "cache_dir": str(tmp_path / "cache"),
                "max_bytes": 0,
                "workers": 0,
            },
            "train": {"batch_size": 2, "accumulate": 1, "val_batches": 3},
        }
    )


def changed(cfg: DictConfig, **values) -> DictConfig:
    copy = cfg.copy()
    for key, value in values.items():
        OmegaConf.update(copy, key.replace("__", "."), value)
    return copy


def as_rank(cfg: DictConfig, rank: int, world: int, accumulate: int = 1) -> TextDataModule:
    module = TextDataModule(cfg)
    module.setup()
    module.trainer = SimpleNamespace(
        global_rank=rank, world_size=world, accumulate_grad_batches=accumulate, global_step=0
    )
    module._align_accumulation = lambda: None
    return module


def take(module: TextDataModule, count: int) -> list[dict[str, torch.Tensor]]:
    return list(itertools.islice(module.train_dataloader(), count))


class Recorder(pl.LightningModule):
    """Counts which tokens each optimizer step has seen; fails before a given micro-batch."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.fail_at, self.micro_batches = fail_at, 0
        self.steps: dict[int, list] = {}

    def training_step(self, batch, batch_idx):
        if self.micro_batches == self.fail_at:
            raise RuntimeError("planned")
        self.micro_batches += 1
        self.steps.setdefault(self.trainer.global_step, []).append(batch["tokens_BT"].tolist())
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(cfg, folder: Path, steps: int, fail_at=None, ckpt=None, **settings) -> dict[int, list]:
    model = Recorder(fail_at)
    callback = ModelCheckpoint(
        dirpath=folder,
        save_last=True,
        every_n_train_steps=1 if fail_at is None else 100,
        save_on_exception=True,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        accumulate_grad_batches=cfg.train.accumulate,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[callback],
        check_val_every_n_epoch=None,
        **{"val_check_interval": 10**6, **settings},
    )
    try:
        trainer.fit(model, TextDataModule(cfg), ckpt_path=ckpt)
    except RuntimeError as error:
        assert fail_at is not None and "planned" in str(error)
    return model.steps


def test_batches_have_the_agreed_form(cfg: DictConfig) -> None:
    module = TextDataModule(cfg)
    module.prepare_data()
    module.setup("fit")
    (batch,) = take(module, 1)
    assert set(batch) == {"tokens_BT", "targets_BT", "doc_start_BT"}
    for tensor in batch.values():
        assert tensor.shape == (2, CONTEXT) and tensor.dtype == torch.int64
    assert module.vocab_size == 258
    assert batch["tokens_BT"].max() == 256


def test_describe_is_plain_and_adds_up(cfg: DictConfig) -> None:
    module = TextDataModule(cfg)
    facts = json.loads(json.dumps(module.describe()))
    assert facts["documents"] == 30 == facts["train_documents"] + facts["val_documents"]
    assert facts["tokens"] == facts["bytes"] + 30 == facts["train_tokens"] + facts["val_tokens"]
    assert facts["bytes_per_token"] == pytest.approx(facts["bytes"] / facts["tokens"])
    assert Path(facts["store"], "tokens.bin").is_file() and len(facts["sha256"]) == 64


def test_two_ranks_read_the_global_batch_of_one(cfg: DictConfig) -> None:
    one = take(as_rank(changed(cfg, train__batch_size=4), 0, 1), 30)
    ranks = [take(as_rank(cfg, rank, 2), 30) for rank in range(2)]
    for whole, left, right in zip(one, *ranks, strict=True):
        for key in whole:
            torch.testing.assert_close(torch.cat([left[key], right[key]]), whole[key])


def test_loader_processes_keep_the_order(cfg: DictConfig) -> None:
    alone = take(as_rank(cfg, 0, 1), 7)
    several = take(as_rank(changed(cfg, data__workers=2), 0, 1), 7)
    for left, right in zip(alone, several, strict=True):
        torch.testing.assert_close(left["tokens_BT"], right["tokens_BT"])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_resume_from_a_step_checkpoint_reads_what_follows(
    cfg: DictConfig, tmp_path: Path, accumulate: int
) -> None:
    cfg = changed(cfg, train__accumulate=accumulate)
    whole = fit(cfg, tmp_path / "whole", 12)
    assert [len(batches) for batches in whole.values()] == [accumulate] * 12
    first = fit(cfg, tmp_path / "parts", 5)
    rest = fit(cfg, tmp_path / "parts", 12, ckpt=tmp_path / "parts" / "last.ckpt")
    assert first | rest == whole
    assert min(rest) == 5


@pytest.mark.parametrize("fail_at", [12, 13, 14])
def test_resume_after_an_exception_repeats_the_interrupted_step(
    cfg: DictConfig, tmp_path: Path, fail_at: int
) -> None:
    cfg = changed(cfg, train__accumulate=3)
    whole = fit(cfg, tmp_path / "whole", 8)
    broken = fit(cfg, tmp_path / "broken", 8, fail_at=fail_at)
    assert broken == {s: b[: max(0, fail_at - 3 * s)] for s, b in whole.items() if fail_at > 3 * s}
    files = sorted((tmp_path / "broken").glob("*.ckpt"))
    assert files, list((tmp_path / "broken").iterdir())
    rest = fit(cfg, tmp_path / "broken", 8, ckpt=files[-1])
    assert rest == {step: batches for step, batches in whole.items() if step >= 4}


def test_resume_with_validation_in_between(cfg: DictConfig, tmp_path: Path) -> None:
    cfg = changed(cfg, train__accumulate=2)
    whole = fit(cfg, tmp_path / "whole", 9, val_check_interval=4)
    fit(cfg, tmp_path / "parts", 4, val_check_interval=4)
    rest = fit(
        cfg, tmp_path / "parts", 9, ckpt=tmp_path / "parts" / "last.ckpt", val_check_interval=4
    )
    assert rest == {step: batches for step, batches in whole.items() if step >= 4}


def test_short_lightning_epochs_do_not_repeat_data(cfg: DictConfig, tmp_path: Path) -> None:
    cfg = changed(cfg, train__accumulate=2)
    whole = fit(cfg, tmp_path / "whole", 9)
    settings = {"limit_train_batches": 4, "val_check_interval": None}
    assert fit(cfg, tmp_path / "short", 9, **settings) == whole


class RankRecorder(Recorder):
    """Also writes what its rank has seen, in training and validation."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.validated = folder, []

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch["tokens_BT"].tolist())

    def on_train_end(self) -> None:
        seen = {"train": list(self.steps.values()), "validation": self.validated}
        (self.folder / f"{self.global_rank}.json").write_text(json.dumps(seen))


def test_lightning_leaves_the_sharding_to_us(cfg: DictConfig, tmp_path: Path) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=3,
    )
    trainer.fit(RankRecorder(tmp_path), TextDataModule(cfg))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    one = as_rank(changed(cfg, train__batch_size=4), 0, 1)
    for step, batch in enumerate(take(one, 3)):
        halves = [found[rank]["train"][step][0] for rank in range(2)]
        assert halves[0] + halves[1] == batch["tokens_BT"].tolist()
    for batch, halves in zip(
        one.val_dataloader(), zip(*(f["validation"] for f in found), strict=True), strict=True
    ):
        assert halves[0] + halves[1] == batch["tokens_BT"].tolist()


def test_validation_is_fixed_and_ranks_share_it(cfg: DictConfig) -> None:
    cfg = changed(cfg, train__val_batches=100)
    windows = TextDataModule(cfg).describe()["val_windows"]
    one = as_rank(cfg, 0, 1)
    rows = [row.tolist() for batch in one.val_dataloader() for row in batch["tokens_BT"]]
    again = as_rank(changed(cfg, seed=7), 0, 1).val_dataloader()
    assert [row.tolist() for batch in again for row in batch["tokens_BT"]] == rows
    assert len(rows) == windows > 4
    world = 3
    loaders = [as_rank(cfg, rank, world).val_dataloader() for rank in range(world)]
    assert len({len(loader) for loader in loaders}) == 1
    shared = []
    for batches in zip(*loaders, strict=True):
        for batch in batches:
            scored = (batch["targets_BT"] >= 0).any(dim=1)
            shared += [row.tolist() for row in batch["tokens_BT"][scored]]
    assert shared == rows


def test_more_ranks_than_validation_windows(cfg: DictConfig) -> None:
    loaders = [as_rank(cfg, rank, 16).val_dataloader() for rank in range(16)]
    scored = 0
    for loader in loaders:
        (batch,) = list(loader)
        scored += int((batch["targets_BT"] >= 0).any(dim=1).sum())
    assert scored == TextDataModule(cfg).describe()["val_windows"]


def test_val_batches_limits_the_windows(cfg: DictConfig) -> None:
    assert len(list(as_rank(changed(cfg, train__val_batches=2), 0, 1).val_dataloader())) == 2
    assert as_rank(changed(cfg, data__val_fraction=0), 0, 1).val_dataloader() == []


def test_training_never_reads_validation_documents(cfg: DictConfig) -> None:
    module = as_rank(cfg, 0, 1)
    split, stream = module.split, module.train_dataloader().dataset.stream
    validation = split.validation
    pairs = zip(validation.starts, validation.lengths, strict=True)
    held = [(start, start + length) for start, length in pairs]
    for number in range(3 * stream.windows_per_epoch):
        for start, stop in stream.pieces(*divmod(number, stream.windows_per_epoch)):
            assert all(stop <= a or start >= b for a, b in held)


def test_context_longer_than_the_data_is_a_user_error(cfg: DictConfig) -> None:
    with pytest.raises(UserError, match="context 100000 is longer"):
        TextDataModule(changed(cfg, context=100_000)).prepare_data()


def test_single_document_is_announced(cfg: DictConfig, tmp_path: Path, capsys) -> None:
    (tmp_path / "book.txt").write_text("word " * 500)
    module = TextDataModule(changed(cfg, data__paths=[str(tmp_path / "book.txt")]))
    module.prepare_data()
    assert "the end of book.txt is the validation split" in capsys.readouterr().err


def test_cache_folder_comes_from_the_environment(cfg, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GSA_CACHE", str(tmp_path / "elsewhere"))
    module = TextDataModule(changed(cfg, data__cache_dir=None))
    module.prepare_data()
    assert Path(module.describe()["store"]).is_relative_to(tmp_path / "elsewhere")
