"""Sources of text documents: the Python standard library and user files; choice by name."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gsa_platform.errors import UserError

CHUNK_BYTES = 4 << 20
STDLIB_ENOUGH = 8 << 20
_TEST_FOLDERS = {"test", "tests", "idle_test"}
_FOREIGN_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """A document: a name that is stable across machines, and its text in pieces, in order.

    Only documents above `CHUNK_BYTES` come in more than one piece; `chunks` is read once.
    """

    name: str
    chunks: Iterable[str]


class Source(Protocol):
    """What the token store needs: a cheap fingerprint, a size estimate, and the documents."""

    @property
    def name(self) -> str:
        """Short name for messages."""

    def fingerprint(self) -> str:
        """Hex digest that changes when the documents change; does not read their contents."""

    def size(self) -> int | None:
        """Bytes of text, when known without reading it."""

    def __iter__(self) -> Iterator[Document]: ...


def digest(value: Any) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_chunks(path: Path, strict: bool = True) -> Iterator[str]:
    """Text of a utf-8 file in pieces of at most `CHUNK_BYTES`, cut behind a line end if possible.

    With strict, a file that is binary or not utf-8 is a UserError naming it; otherwise reading it
    ends at the first undecodable piece.
    """
    rest, first = b"", True
    with path.open("rb") as handle:
        while True:
            # The remainder counts into the piece, so a file without line ends stays linear.
            block = handle.read(CHUNK_BYTES - len(rest))
            data, rest = rest + block, b""
            if block:
                cut = data.rfind(b"\n") + 1 or _character_border(data)
                data, rest = data[:cut], data[cut:]
            if first:
                data, first = data.removeprefix(b"\xef\xbb\xbf"), False
            if b"\0" in data:
                text = None
            else:
                try:
                    text = data.decode("utf-8")
                except UnicodeDecodeError:
                    text = None
            if text is None:
                if not strict:
                    return
                raise UserError(
                    f"{path} is not utf-8 text. Convert it, or leave it out with a narrower glob"
                    " in data.paths, for example 'folder/**/*.txt'."
                )
            if text:
                yield text
            if not block:
                return


def _character_border(data: bytes) -> int:
    """Largest cut that does not split a utf-8 character (whole data if it is not utf-8)."""
    for back in range(1, min(4, len(data)) + 1):
        lead = data[-back]
        if lead & 0xC0 != 0x80:
            width = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            # A cut at 0 would make no progress; such data is undecodable or at its end anyway.
            return (len(data) - back if width > back else len(data)) or len(data)
    return len(data)


class _Budget:
    """Counts text bytes and cuts the piece that passes the limit (0: no limit)."""

    def __init__(self, max_bytes: int) -> None:
        self.left: float = max_bytes or float("inf")

    def cut(self, chunks: Iterable[str]) -> Iterator[str]:
        for chunk in chunks:
            size = len(chunk.encode())
            if size > self.left:
                chunk = chunk.encode()[: int(self.left)].decode("utf-8", errors="ignore")
            self.left -= size
            if chunk:
                yield chunk
            if self.left <= 0:
                return


def limited(documents: Iterable[Document], max_bytes: int) -> Iterator[Document]:
    """The documents up to `max_bytes` bytes of text in all; the last one is cut, 0 means all."""
    budget = _Budget(max_bytes)
    for document in documents:
        if budget.left <= 0:
            return
        yield Document(document.name, budget.cut(document.chunks))


@dataclass(frozen=True)
class FileSource:
    """Text files, one document each, in the order given; `files` holds (name, path)."""

    name: str
    files: tuple[tuple[str, Path], ...]
    identity: str
    max_bytes: int = 0
    strict: bool = True

    def fingerprint(self) -> str:
        return digest([self.name, self.identity, self.max_bytes])

    def size(self) -> int:
        total = sum(path.stat().st_size for _, path in self.files)
        return min(total, self.max_bytes) if self.max_bytes else total

    def __iter__(self) -> Iterator[Document]:
        documents = (Document(name, read_chunks(path, self.strict)) for name, path in self.files)
        return limited(documents, self.max_bytes)


def stdlib_source(max_bytes: int = 0, root: Path | None = None) -> FileSource:
    """The .py files of the running Python's standard library, by relative path.

    Installed packages are left out; test folders are too, unless the rest is less than 8 MiB.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    found: list[tuple[str, Path, int]] = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in _FOREIGN_FOLDERS]
        for file in files:
            if file.endswith(".py"):
                path = Path(folder, file)
                found.append((path.relative_to(root).as_posix(), path, path.stat().st_size))
    found.sort()
    library = [f for f in found if not _TEST_FOLDERS.intersection(f[0].split("/"))]
    chosen = library if sum(f[2] for f in library) >= STDLIB_ENOUGH else found
    if not chosen:
        raise UserError(
            f"data.name=stdlib: no .py files under {root}. Use data.name=text data.paths=[...]."
        )
    identity = digest([platform.python_version(), [(name, size) for name, _, size in chosen]])
    files_ = tuple((name, path) for name, path, _ in chosen)
    return FileSource("stdlib", files_, identity, max_bytes, strict=False)


def text_source(paths: Iterable[str], max_bytes: int = 0) -> FileSource:
    """User files: an entry is a file, a folder (all its files but hidden ones), or a glob with **.

    Raises UserError if an entry matches nothing, or if nothing but empty files is found.
    """
    patterns = [paths] if isinstance(paths, str) else list(paths or ())
    if not patterns:
        raise UserError("data.name=text needs data.paths=[...]: files, folders or globs.")
    found: set[Path] = set()
    for pattern in patterns:
        files = _expand(os.path.expanduser(pattern))
        if not files:
            raise UserError(f"data.paths: {pattern!r} matches no file (looked in {os.getcwd()}).")
        found.update(files)
    chosen = [(path, path.stat()) for path in sorted(found)]
    chosen = [(path, stat) for path, stat in chosen if stat.st_size]
    if not chosen:
        raise UserError(f"data.paths: the {len(found)} file(s) of {patterns} are all empty.")
    # Names relative to the common folder keep the split the same on another machine.
    common = os.path.commonpath([path.parent for path, _ in chosen])
    entries = tuple((path.relative_to(common).as_posix(), path) for path, _ in chosen)
    identity = digest([[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in chosen])
    return FileSource("text", entries, identity, max_bytes)


def _expand(pattern: str) -> list[Path]:
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "**")
    if os.path.isfile(pattern):
        return [Path(pattern).resolve()]
    matches = glob.iglob(pattern, recursive=True)
    return [Path(match).resolve() for match in matches if os.path.isfile(match)]


def build_source(data: Any) -> Source:
    """The source that the `data` node of the configuration names."""
    max_bytes = int(data.get("max_bytes") or 0)
    if data.name == "stdlib":
        return stdlib_source(max_bytes)
    if data.name == "text":
        return text_source(data.get("paths") or (), max_bytes)
    if data.name == "hf":
        # Here, because hf.py needs this file.
        from gsa_platform.data.hf import LOCAL, HuggingFaceSource

        path, column = data.get("path"), data.get("column") or "text"
        if not path:
            raise UserError(f"data.name=hf needs data.path: {LOCAL}, or a name on the Hub.")
        split = data.get("split") or "train"
        return HuggingFaceSource(path, data.get("config_name"), split, column, max_bytes)
    raise UserError(f"data.name={data.name!r} is unknown; choices: stdlib, text, hf")
