"""Options of benchmarks: what may be typed, and what is said of the rest."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from gsa_platform import BenchmarkSettings
from gsa_platform.bench.options import choices, flags, help_text, parse
from gsa_platform.errors import UserError


@dataclass
class Settings(BenchmarkSettings):
    mode: str = field(default="tile", metadata={"choices": ("tile", "block")})
    seq_len: list[int] = field(default_factory=lambda: [8])
    kinds: list[str] = field(default_factory=list, metadata={"choices": ("a", "b")})
    seconds: float = 1.0
    quick: bool = False


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", {}),
        ("--mode block --seq-len 1 2", {"mode": "block", "seq_len": [1, 2]}),
        (
            "--seq-len 1,2 --quick --mode=block",
            {"seq_len": [1, 2], "quick": True, "mode": "block"},
        ),
        ("seq_len=4 --kinds a b", {"seq_len": [4], "kinds": ["a", "b"]}),
        ("--seq-len 4 mode=block quick=false", {"seq_len": [4], "mode": "block"}),
        ("--seconds 0.5 --out a=b.json", {"seconds": 0.5, "out": "a=b.json"}),
    ],
)
def test_what_may_be_typed(words, expected):
    assert parse(Settings, words.split(), "bench x") == Settings(**expected)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--mod block", ["does not take '--mod'", "Did you mean '--mode'", "--seq-len"]),
        ("block", ["does not take 'block'", "--mode"]),
        ("--mode til", ["value of --mode 'til'", "Did you mean 'tile'", "Choices: block, tile"]),
        ("--kinds a,c", ["value of --kinds 'c'", "Choices: a, b"]),
        ("--seq-len 8k", ["--seq-len 8k: needs a whole number"]),
        ("--seq-len", ["--seq-len needs at least one value"]),
        ("--mode", ["--mode needs a value"]),
        ("--seconds x", ["needs a number"]),
        ("--quick=maybe", ["needs true or false"]),
    ],
)
def test_what_may_not(words, parts):
    with pytest.raises(UserError) as error:
        parse(Settings, words.split(), "bench x")
    for part in parts:
        assert part in str(error.value)


def test_every_option_is_listed():
    text = help_text(Settings, "bench x", "Says x", {"seconds": "of each"})
    assert all(flag in text for flag in flags(Settings))
    assert "--mode tile" in text and "tile, block" in text and "of each" in text
    assert choices(Settings, "--mode") == ("tile", "block") and choices(Settings, "--out") == ()
