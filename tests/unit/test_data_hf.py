"""Hugging Face data sets: with the real library where it is installed, else with a stand-in."""

import json
import sys
import types
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from gsa_platform.data.hf import HuggingFaceSource
from gsa_platform.data.sources import build_source
from gsa_platform.errors import UserError

ROWS = [{"body": f"row {i}\n" + "word " * i, "url": f"u{i}", "n": i} for i in range(10)]


def contents(path, split="train", column="body", config=None) -> list[str]:
    source = HuggingFaceSource(str(path), config, split, column)
    return ["".join(document.chunks) for document in source]


def bodies(*numbers: int) -> list[str]:
    return [ROWS[i]["body"] for i in numbers]


class FakeRows(list):
    _fingerprint = "f1"
    features = {
        "body": types.SimpleNamespace(dtype="string"),
        "n": types.SimpleNamespace(dtype="int64"),
    }
    column_names = ["body", "n"]

    def select_columns(self, columns):
        return self

    def iter(self, batch_size):
        for low in range(0, len(self), batch_size):
            yield {"body": self[low : low + batch_size]}


def test_without_the_library(monkeypatch, tmp_path: Path) -> None:
    node = OmegaConf.create({"name": "hf", "path": str(tmp_path), "column": "body"})
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"gsa-platform\[hf\]"):
        build_source(node)
    with pytest.raises(UserError, match=r"data\.path"):
        build_source(OmegaConf.create({"name": "hf"}))


def test_rows_of_a_stand_in(monkeypatch, tmp_path: Path) -> None:
    builder = types.SimpleNamespace(
        config=None,
        download_and_prepare=lambda: None,
        as_dataset=lambda split: FakeRows(["first", None, "third"]),
    )
    fake = types.SimpleNamespace(
        load_dataset_builder=lambda path, name: builder,
        disable_progress_bars=lambda: None,
        exceptions=types.SimpleNamespace(DatasetsError=RuntimeError),
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert contents(tmp_path) == ["first", "", "third"]
    with pytest.raises(UserError, match=r"data\.column=text is not in .*: body, n\."):
        contents(tmp_path, column="text")
    with pytest.raises(UserError, match=r"does not hold text.*: body"):
        contents(tmp_path, column="n")


@pytest.fixture
def library(monkeypatch, tmp_path: Path):
    """The real package, with a cache of its own and no network."""
    datasets = pytest.importorskip("datasets")
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return datasets


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a split of seven rows and one of three, as JSON lines."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, rows in (("train", ROWS[:7]), ("test", ROWS[7:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_folders_files_and_slices(library, folder: Path, tmp_path: Path) -> None:
    assert contents(folder) == bodies(*range(7))
    assert contents(folder, "test") == bodies(7, 8, 9)
    assert contents(folder, "train[:2]") == bodies(0, 1)
    assert contents(folder, "train[:2]+test[2:]") == bodies(0, 1, 9)
    assert contents(folder / "test.jsonl") == bodies(7, 8, 9)
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "all.json").write_text(json.dumps(ROWS))
    assert contents(tmp_path / "json") == bodies(*range(10))
    (tmp_path / "parquet").mkdir()
    library.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "parquet" / "all.parquet"))
    assert contents(tmp_path / "parquet") == bodies(*range(10))


def test_a_text_file_is_one_document(library, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one\ntwo\n\nthree\n")
    (tmp_path / "texts" / "b.txt").write_text("four")
    assert contents(tmp_path / "texts", column="text") == ["one\ntwo\n\nthree\n", "four"]


def test_saved_data_sets(library, tmp_path: Path) -> None:
    rows = library.Dataset.from_list(ROWS)
    rows.save_to_disk(str(tmp_path / "one"))
    both = library.DatasetDict(train=rows.select(range(7)), test=rows.select(range(7, 10)))
    both.save_to_disk(str(tmp_path / "two"))
    assert contents(tmp_path / "one") == bodies(*range(10))
    assert contents(tmp_path / "one", "train[8:]") == bodies(8, 9)
    assert contents(tmp_path / "two", "test") == bodies(7, 8, 9)
    assert contents(tmp_path / "two", "train[:1]+test[:1]") == bodies(0, 7)
    for name, splits in (("one", "'train'"), ("two", "'train', 'test'")):
        with pytest.raises(UserError, match=f"split=dev cannot be loaded.*{splits}"):
            contents(tmp_path / name, "dev")


def test_the_fingerprint_follows_the_data(library, folder: Path) -> None:
    def fingerprint(split: str = "train") -> str:
        return HuggingFaceSource(str(folder), None, split, "body").fingerprint()

    before = fingerprint()
    assert fingerprint() == before and fingerprint("test") != before
    (folder / "train.jsonl").write_text(json.dumps({"body": "another", "url": "", "n": 0}) + "\n")
    assert fingerprint() != before


def test_mistakes_name_the_choices(library, folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jsonl").write_text('{"body": "x"\n{{{\n')
    mistakes = [
        ((folder, "dev"), r"data\.split=dev cannot be loaded.*'train', 'test'"),
        ((folder, "train", "text"), "Its columns: body, url, n"),
        ((folder, "train", "n"), "Columns that do: body, url"),
        ((folder, "train", "body", "en"), r"config_name=en .*'default'"),
        (("empty",), "doesn't contain any data files"),
        (("bad",), "JSON parse error"),
        (("./nowhere",), "no such file or folder. Give a local path"),
        (("nowhere.jsonl",), "no such file or folder. Give a local path"),
    ]
    for arguments, message in mistakes:
        with pytest.raises(UserError, match=message):
            contents(*arguments)


def test_an_unreachable_name_says_what_to_try(library, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        contents("some/set", config="en")
    message = str(caught.value)
    assert message.startswith("data.path=some/set data.config_name=en: ")
    for part in ("Hub cannot be reached", "local path", "jsonl", "save_to_disk", "data=text"):
        assert part in message
    assert "\n" not in message and "Retrying" not in capsys.readouterr().err
