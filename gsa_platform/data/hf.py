"""Hugging Face data sets as a source of documents: local data, or a name on the Hub."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gsa_platform.data.sources import Document, digest, limited
from gsa_platform.errors import UserError

LOCAL = (
    "a local path (a folder of jsonl, json, parquet, csv or txt files, one such file, or a folder"
    " written by save_to_disk)"
)
_SUFFIXES = {".jsonl", ".json", ".parquet", ".csv", ".txt", ".arrow", ".gz", ".zst", ".zip"}
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_TEXT_TYPES = ("string", "large_string", "string_view")
_ROWS = 64  # rows read at once; a row can be a whole book


class HuggingFaceSource:
    """A column of one split of a Hugging Face data set, one document per row.

    path: a local path (see LOCAL) or a name on the Hub. Local txt files are one document each.
    split: a split or a slice of one, such as train[:10%].
    Raises UserError if the optional package `datasets` is missing, the data cannot be loaded, or
    the column does not exist or holds no text.
    """

    name = "hf"

    def __init__(
        self, path: str, config_name: str | None, split: str, column: str, max_bytes: int = 0
    ) -> None:
        try:
            datasets = importlib.import_module("datasets")
        except ImportError as error:
            raise UserError(
                "data.name=hf needs the package datasets: pip install 'gsa-platform[hf]'"
            ) from error
        with _quiet(datasets):
            rows = _load(datasets, path, config_name, split)
        text = [name for name, kind in rows.features.items() if _is_text(kind)]
        if column not in rows.column_names:
            raise UserError(
                f"data.column={column} is not in data.path={path}."
                f" Its columns: {', '.join(rows.column_names)}."
            )
        if column not in text:
            raise UserError(
                f"data.column={column} of data.path={path} does not hold text."
                f" Columns that do: {', '.join(text) or 'none'}."
            )
        self._rows: Any = rows.select_columns([column])
        self._column, self._max_bytes = column, max_bytes
        self._identity = [path, config_name, split, column, max_bytes, rows._fingerprint]

    def fingerprint(self) -> str:
        return digest([self.name, *self._identity])

    def size(self) -> int | None:
        return self._max_bytes or None

    def __iter__(self) -> Iterator[Document]:
        return limited(self._documents(), self._max_bytes)

    def _documents(self) -> Iterator[Document]:
        number = 0
        for batch in self._rows.iter(batch_size=_ROWS):
            for text in batch[self._column]:
                yield Document(str(number), [text] if text else [])
                number += 1


def _is_text(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in _TEXT_TYPES


def _load(datasets: Any, path: str, config_name: str | None, split: str) -> Any:
    """The rows of one split; every failure that the user can do something about is a UserError."""
    local = Path(path).expanduser()
    there = local.exists()
    hub = not there and bool(_HUB_NAME.fullmatch(path)) and local.suffix not in _SUFFIXES
    if not there and not hub:
        raise UserError(f"data.path={path}: no such file or folder. Give {LOCAL}.")
    if hub:
        print(f"looking up {path} on the Hugging Face Hub ...", file=sys.stderr, flush=True)
    asked = f"data.path={path}" + (f" data.config_name={config_name}" if config_name else "")
    try:
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            return _saved(datasets, local, split)
        return _prepared(datasets, str(local) if there else path, config_name, split)
    except ConnectionError as error:
        raise UserError(
            f"{asked}: there is no such file or folder here (looked in {os.getcwd()}), and the"
            f" Hugging Face Hub cannot be reached: {_first_line(error)}. Give {LOCAL}, or use text"
            " files: data=text 'data.paths=[corpus/*.txt]'."
        ) from error
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # Errors while reading the files come wrapped in one that says nothing.
        wrapped = isinstance(error, datasets.exceptions.DatasetsError)
        reason = (error.__cause__ if wrapped else None) or error
        hint = f" For data on this machine give {LOCAL}." if hub else ""
        raise UserError(
            f"{asked} data.split={split} cannot be loaded: {_first_line(reason)}.{hint}"
        ) from error


def _prepared(datasets: Any, path: str, config_name: str | None, split: str) -> Any:
    """Rows of a folder of data files, of one file, or of a data set on the Hub."""
    files: dict[str, Any] = {}
    if os.path.isfile(path):
        path, name = os.path.split(os.path.abspath(path))
        files = {"data_files": [name]}
    builder = datasets.load_dataset_builder(path, config_name, **files)
    if getattr(builder.config, "sample_by", None) == "line":
        # Text files are documents here, not one document per line.
        files["sample_by"] = "document"
        builder = datasets.load_dataset_builder(path, config_name, **files)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _saved(datasets: Any, folder: Path, split: str) -> Any:
    """Rows of a folder written by save_to_disk; one without splits is all `train`."""
    saved = datasets.load_from_disk(str(folder))
    splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    chosen = datasets.ReadInstruction.from_spec(split).to_absolute(
        {name: len(rows) for name, rows in splits.items()}
    )
    # select keeps a fingerprint that says which rows were taken
    parts = [splits[part.splitname].select(range(part.from_, part.to)) for part in chosen]
    return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().partition("\n")[0] or type(error).__name__).rstrip(".")


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Leave it to the exception to report retries and unreadable files, and bars to terminals."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    levels = {"huggingface_hub": logging.ERROR, "datasets.packaged_modules": logging.CRITICAL}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
