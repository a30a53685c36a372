"""Tokenizers: raw bytes, or any `tokenizers` JSON file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gsa_platform.errors import UserError

Tokens = npt.NDArray[np.integer[Any]]
BOS_NAMES = ("<|bos|>", "<s>", "<bos>", "<|endoftext|>", "[CLS]")


class Tokenizer(Protocol):
    """Text to token ids and back. Ids are 1-D integer arrays; `bos_id` begins every document."""

    name: str
    fingerprint: str
    vocab_size: int
    bos_id: int

    def encode(self, text: str) -> Tokens:
        """Ids of the text alone: no special token is added or read from the text."""

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """`encode` of each text."""

    def decode(self, tokens: Sequence[int] | Tokens) -> str:
        """Text of the ids, without special tokens."""


class BytesTokenizer:
    """The 256 bytes of utf-8, then <bos> = 256 and <pad> = 257."""

    name = "bytes"
    bos_id = 256
    pad_id = 257
    vocab_size = 258
    fingerprint = "bytes-bos256-pad257"

    def encode(self, text: str) -> Tokens:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Sequence[int] | Tokens) -> str:
        ids = np.asarray(tokens, dtype=np.int64)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class JsonTokenizer:
    """A `tokenizers` JSON file.

    The file must hold one of the tokens <|bos|>, <s>, <bos>, <|endoftext|>, [CLS] (the first of
    these that exists is used) to begin documents with. Truncation, padding and the special tokens
    of the file's post-processor are switched off, and special tokens spelled out in the text are
    read as plain text.

    Raises UserError if the package or the file is missing, the file is malformed, or it has no
    such token.
    """

    def __init__(self, path: str) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                "data.tokenizer is a JSON file, which needs the package tokenizers:"
                " pip install 'gsa-platform[tokenizers]'"
            ) from error
        try:
            content = Path(path).expanduser().read_bytes()
        except OSError as error:
            raise UserError(
                f"data.tokenizer={path!r}: {error.strerror}. Choices: 'bytes', or the path of a"
                " tokenizers JSON file."
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the package raises plain Exception for a malformed file
            raise UserError(
                f"data.tokenizer={path!r} is not a tokenizers JSON file: {error}"
            ) from error
        # Loader processes are forked after tokenising and never tokenise; without this setting the
        # package warns in each of them.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        ids = [self._tokenizer.token_to_id(token) for token in BOS_NAMES]
        known = [i for i in ids if i is not None]
        if not known:
            raise UserError(
                f"data.tokenizer={path!r} has no token to begin documents with; one of"
                f" {', '.join(BOS_NAMES)} must be in its vocabulary."
            )
        self.name = Path(path).name
        self.bos_id = known[0]
        # Ids can have holes, so the size is the largest id plus one, not the number of tokens.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> Tokens:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, tokens: Sequence[int] | Tokens) -> str:
        ids = np.asarray(tokens, dtype=np.int64).tolist()
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def build_tokenizer(name: str) -> Tokenizer:
    """The tokenizer for `data.tokenizer`: "bytes" or the path of a tokenizers JSON file."""
    return BytesTokenizer() if name == "bytes" else JsonTokenizer(name)
