"""Tokenizers: round trips, special tokens, and errors of the JSON file."""

import json
import sys
from pathlib import Path

import pytest

from gsa_platform.data.tokenizers import build_tokenizer
from gsa_platform.errors import UserError

TEXT = "The quick brown fox, zwölf 😀, jumps.\n\tEnd"


def bpe_file(path: Path, special: str | None, **settings) -> str:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[special] if special else [],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    if special:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{special} $A", special_tokens=[(special, 0)]
        )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(path))
    return str(path)


def test_bytes_round_trip() -> None:
    tokenizer = build_tokenizer("bytes")
    tokens = tokenizer.encode(TEXT)
    assert tokens.tolist() == list(TEXT.encode())
    assert tokenizer.decode([tokenizer.bos_id, *tokens.tolist(), 257]) == TEXT
    assert tokenizer.bos_id == 256 and tokenizer.vocab_size == 258


@pytest.mark.parametrize("special", ["<|bos|>", "<|endoftext|>", "[CLS]"])
def test_json_round_trip_without_the_files_own_specials(tmp_path: Path, special: str) -> None:
    tokenizer = build_tokenizer(bpe_file(tmp_path / "bpe.json", special))
    tokens = tokenizer.encode(TEXT)
    assert tokenizer.decode(tokens) == TEXT
    assert len(TEXT.encode()) > len(tokens) > 4
    assert tokenizer.bos_id not in tokens
    assert tokens.max() < tokenizer.vocab_size
    assert tokenizer.decode([tokenizer.bos_id, *tokens]) == TEXT


def test_special_token_in_the_text_is_plain_text(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(bpe_file(tmp_path / "bpe.json", "<s>"))
    tokens = tokenizer.encode("a<s>b")
    assert tokenizer.bos_id not in tokens
    assert tokenizer.decode(tokens) == "a<s>b"


def test_fingerprint_is_of_the_contents(tmp_path: Path) -> None:
    one = bpe_file(tmp_path / "one.json", "<s>")
    two = tmp_path / "two.json"
    two.write_bytes(Path(one).read_bytes())
    other = bpe_file(tmp_path / "three.json", "<bos>")
    assert build_tokenizer(one).fingerprint == build_tokenizer(str(two)).fingerprint
    assert build_tokenizer(one).fingerprint != build_tokenizer(other).fingerprint


def test_errors(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match="'bytes', or the path"):
        build_tokenizer(str(tmp_path / "missing.json"))
    with pytest.raises(UserError, match=r"<\|endoftext\|>"):
        build_tokenizer(bpe_file(tmp_path / "bare.json", None))
    bad = tmp_path / "bad.json"
    for content in (b"not json", json.dumps({"a": 1}).encode(), b"\xff\xfe"):
        bad.write_bytes(content)
        with pytest.raises(UserError, match="not a tokenizers JSON file"):
            build_tokenizer(str(bad))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"gsa-platform\[tokenizers\]"):
        build_tokenizer(str(bad))
