"""Token store: a folder with the token ids of a corpus, built once per content key and mapped."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from gsa_platform.data.sources import Source, digest
from gsa_platform.data.tokenizers import Tokenizer, Tokens
from gsa_platform.errors import UserError

FORMAT = 1
BATCH_CHARACTERS = 4 << 20
_END_BYTES = 1 << 20
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


class CorruptStore(Exception):
    """A store folder that does not match its own meta.json."""


@dataclass
class TokenStore:
    """An open store.

    `offsets` holds the first token of each document and, at its end, the number of tokens; `names`
    the document names; `tokens` is the read-only map of all token ids.
    """

    folder: Path
    meta: dict[str, Any]
    offsets: npt.NDArray[np.int64]
    names: list[str]
    tokens: Tokens

    def __getstate__(self) -> dict[str, Any]:
        # A map would be pickled as a copy of the whole corpus.
        return {key: value for key, value in self.__dict__.items() if key != "tokens"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.tokens = _map_tokens(self.folder, self.meta)


def default_cache_dir() -> Path:
    """$GSA_CACHE, or ~/.cache/gsa_platform."""
    return Path(os.environ.get("GSA_CACHE") or "~/.cache/gsa_platform").expanduser()


def ensure_store(
    source: Source, tokenizer: Tokenizer, cache_dir: Path, verify: bool = False
) -> TokenStore:
    """Open the store of this source and tokenizer, building it if it is missing or corrupt.

    Several processes may call this at once: one builds and the others wait. With `verify`, every
    token is checked against the checksum, otherwise sizes and both ends of the file.

    Raises UserError if the folder cannot be written, the disk is full, or there is no text.
    """
    key = digest([FORMAT, source.fingerprint(), tokenizer.fingerprint])[:32]
    root = cache_dir / "tokens"
    folder = root / key
    if folder.exists():
        try:
            return open_store(folder, verify)
        except CorruptStore:
            pass  # announced under the lock: another process may be replacing it right now
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{key}.lock"):
            if folder.exists():
                try:
                    return open_store(folder, verify)
                except CorruptStore as error:
                    _say(f"rebuilding the token store {folder}: {error}")
            return _build(source, tokenizer, folder, key)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise UserError(_disk_full_message(source, tokenizer, root)) from error
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}:
            raise UserError(
                f"cannot write the token cache {root}: {error.strerror}."
                " Choose a folder with data.cache_dir= or $GSA_CACHE."
            ) from error
        raise


def open_store(folder: Path, verify: bool = False) -> TokenStore:
    """Open a store; raises CorruptStore if files are missing or do not match the checksums."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["format"] != FORMAT:
            raise CorruptStore(f"format {meta['format']}, expected {FORMAT}")
        for name in ("documents.npy", "names.txt"):
            if _sha256(folder / name) != meta["checksums"][name]:
                raise CorruptStore(f"{name} does not match its checksum")
        tokens = folder / "tokens.bin"
        if tokens.stat().st_size != meta["tokens"] * np.dtype(meta["dtype"]).itemsize:
            raise CorruptStore("tokens.bin has the wrong size")
        if _sha256_of_ends(tokens) != meta["checksums"]["tokens.bin ends"]:
            raise CorruptStore("tokens.bin does not match its checksum")
        if verify and _sha256(tokens) != meta["checksums"]["tokens.bin"]:
            raise CorruptStore("tokens.bin does not match its checksum")
        offsets = np.load(folder / "documents.npy")
        names = (folder / "names.txt").read_text(encoding="utf-8").split("\n")[:-1]
        return TokenStore(folder, meta, offsets, names, _map_tokens(folder, meta))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CorruptStore(f"{type(error).__name__}: {error}") from error


def _map_tokens(folder: Path, meta: dict[str, Any]) -> Tokens:
    return np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0.5)
    except Timeout:
        _say(f"waiting for another process that builds the token store ({path})")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(source: Source, tokenizer: Tokenizer, folder: Path, key: str) -> TokenStore:
    """Write the store into a temporary folder and rename it; the caller holds the lock."""
    prefix = f".building-{key}-"
    for stale in folder.parent.glob(prefix + "*"):  # of a process that died: we hold the lock
        shutil.rmtree(stale)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    old = temporary.with_name(temporary.name + "-old")
    try:
        meta = _write_tokens(source, tokenizer, temporary)
        meta["key"] = key
        (temporary / "meta.json").write_text(json.dumps(meta, indent=2))
        os.chmod(temporary, 0o755)  # mkdtemp makes it private; a cache can be used by a group
        open_store(temporary, verify=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        return open_store(folder)
    except CorruptStore as error:
        raise UserError(
            f"the token cache {folder.parent} does not keep what is written to it: {error}."
            " Choose another folder with data.cache_dir=."
        ) from error
    finally:
        for leftover in (temporary, old):
            if leftover.exists():
                shutil.rmtree(leftover)


def _write_tokens(source: Source, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    dtype = _smallest_dtype(tokenizer.vocab_size)
    progress = _Progress(source)
    offsets, total, text_bytes = array("q", [0]), 0, 0
    checksum = hashlib.sha256()
    bos = np.asarray([tokenizer.bos_id], dtype=dtype)
    with (
        (folder / "tokens.bin").open("wb") as tokens_file,
        (folder / "names.txt").open("w", encoding="utf-8", newline="\n") as names_file,
    ):
        for batch in _batches(source):
            encoded = tokenizer.encode_batch([text for _, text in batch])
            parts: list[Tokens] = []
            for (name, text), ids in zip(batch, encoded, strict=True):
                if name is not None:
                    if total:
                        offsets.append(total)
                    names_file.write(name.replace("\n", " ") + "\n")
                    parts.append(bos)
                    total += 1
                parts.append(ids.astype(dtype, copy=False))
                total += len(ids)
                text_bytes += len(text.encode())
            data = np.concatenate(parts).tobytes()
            _write(tokens_file, data)
            checksum.update(data)
            progress.update(text_bytes)
        tokens_file.flush()
        os.fsync(tokens_file.fileno())
    if not total:
        raise UserError(f"data.name={source.name}: the source holds no text.")
    offsets.append(total)
    np.save(folder / "documents.npy", np.frombuffer(offsets, dtype=np.int64))
    progress.done(total, len(offsets) - 1)
    return {
        "format": FORMAT,
        "source": source.name,
        "source_fingerprint": source.fingerprint(),
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name,
        "bytes": text_bytes,
        "tokens": total,
        "documents": len(offsets) - 1,
        "checksums": {
            "tokens.bin": checksum.hexdigest(),
            "tokens.bin ends": _sha256_of_ends(folder / "tokens.bin"),
            "documents.npy": _sha256(folder / "documents.npy"),
            "names.txt": _sha256(folder / "names.txt"),
        },
    }


def _batches(source: Source) -> Iterator[list[tuple[str | None, str]]]:
    """Groups of (name, text) for one tokenizer call; the name is None inside a long document."""
    batch: list[tuple[str | None, str]] = []
    characters = 0
    for document in source:
        name: str | None = document.name
        for chunk in document.chunks:
            batch.append((name, chunk))
            name = None
            characters += len(chunk)
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _write(handle: IO[bytes], data: bytes) -> None:
    handle.write(data)


def _smallest_dtype(vocab_size: int) -> np.dtype[Any]:
    for dtype in (np.uint8, np.uint16):
        if vocab_size <= np.iinfo(dtype).max + 1:
            return np.dtype(dtype)
    return np.dtype(np.uint32)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sha256_of_ends(path: Path) -> str:
    with path.open("rb") as handle:
        head = handle.read(_END_BYTES)
        handle.seek(max(0, path.stat().st_size - _END_BYTES))
        return hashlib.sha256(head + handle.read()).hexdigest()


def _disk_full_message(source: Source, tokenizer: Tokenizer, root: Path) -> str:
    size = source.size()
    # One token per byte is the most that a tokenizer of this platform makes.
    need = f"up to {size * _smallest_dtype(tokenizer.vocab_size).itemsize:,}" if size else "more"
    free = shutil.disk_usage(root).free
    return (
        f"no space left for the token cache {root}: it needs {need} bytes and {free:,} are free."
        " Choose a folder on another disk with data.cache_dir= or less text with data.max_bytes=."
    )


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class _Progress:
    """Progress on stderr: a line that is rewritten on a terminal, else a first and a last line."""

    def __init__(self, source: Source) -> None:
        self.name, self.start, self.shown = source.name, time.monotonic(), 0.0
        self.text_bytes, self.terminal = 0, sys.stderr.isatty()
        size = source.size()
        _say(f"tokenising {self.name}: " + (f"{size / 1e6:.1f} MB ..." if size else "..."))

    def update(self, text_bytes: int) -> None:
        self.text_bytes = text_bytes
        now = time.monotonic()
        if self.terminal and now - self.shown > 0.2:
            self.shown = now
            line = f"\rtokenising {self.name}: {text_bytes / 1e6:.1f} MB done"
            print(line, end="", file=sys.stderr, flush=True)

    def done(self, tokens: int, documents: int) -> None:
        start = "\r" if self.terminal else ""
        seconds = time.monotonic() - self.start
        _say(
            f"{start}tokenised {self.name}: {self.text_bytes / 1e6:.1f} MB, {documents} documents,"
            f" {tokens} tokens in {seconds:.1f} s"
        )
