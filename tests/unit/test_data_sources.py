"""Sources: which documents they yield, and what they say when the input is wrong."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from gsa_platform.data import sources
from gsa_platform.data.sources import build_source, limited, stdlib_source, text_source
from gsa_platform.errors import UserError


def contents(source) -> dict[str, str]:
    return {document.name: "".join(document.chunks) for document in source}


def test_stdlib_is_ordered_text_without_installed_packages() -> None:
    source = stdlib_source()
    names = [name for name, _ in source.files]
    assert names == sorted(names)
    assert "json/decoder.py" in names
    assert not any("site-packages" in name for name in names)
    assert source.size() > 4 << 20
    assert source.fingerprint() == stdlib_source().fingerprint()
    assert source.fingerprint() != stdlib_source(max_bytes=1000).fingerprint()


def test_stdlib_takes_tests_only_when_the_rest_is_small(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text("test")
    (tmp_path / "a.py").write_text("library")
    (tmp_path / "latin.py").write_bytes(b"# \xe9 x")
    assert contents(stdlib_source(root=tmp_path)) == {
        "a.py": "library",
        "latin.py": "",
        "test/t.py": "test",
    }
    monkeypatch.setattr(sources, "STDLIB_ENOUGH", 5)
    assert "test/t.py" not in contents(stdlib_source(root=tmp_path))
    with pytest.raises(UserError, match=r"data\.name=text"):
        stdlib_source(root=tmp_path / "nothing")


def test_text_takes_files_folders_and_recursive_globs(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    (tmp_path / "one.txt").write_text("eins")
    (deep / "two.txt").write_bytes(b"\xef\xbb\xbfzw\xc3\xb6lf")
    (deep / "two.md").write_text("md")
    (deep / "empty.txt").write_text("")
    assert contents(text_source([str(tmp_path / "**" / "*.txt")])) == {
        "one.txt": "eins",
        "a/b/two.txt": "zwölf",
    }
    assert set(contents(text_source([str(tmp_path)]))) == {"one.txt", "a/b/two.txt", "a/b/two.md"}
    both = text_source([str(tmp_path / "one.txt"), str(tmp_path / "*.txt")])
    assert contents(both) == {"one.txt": "eins"}


def test_text_fingerprint_follows_the_files(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("eins")
    before = text_source([str(file)]).fingerprint()
    file.write_text("zweite")
    assert text_source([str(file)]).fingerprint() != before


def test_text_errors_name_the_cause(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        text_source([str(tmp_path / "nowhere" / "*.txt")])
    with pytest.raises(UserError, match=r"data\.paths"):
        text_source([])
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="empty"):
        text_source([str(tmp_path)])
    for data in (b"\xff\xfe\x00x", b"abc\0def", b"abc\xc3"):
        (tmp_path / "bad.bin").write_bytes(data)
        with pytest.raises(UserError, match=r"bad\.bin"):
            contents(text_source([str(tmp_path)]))


@pytest.mark.parametrize("text", ["ab\nc\n" * 50, "äöü€😀" * 40, "x" * 100 + "\n" + "é" * 101])
@pytest.mark.parametrize("size", [5, 7, 64])
def test_long_files_come_in_pieces_that_join_to_the_file(
    tmp_path: Path, monkeypatch, text: str, size: int
) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", size)
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    pieces = list(sources.read_chunks(tmp_path / "long.txt"))
    assert "".join(pieces) == text
    assert len(pieces) > 1
    assert max(len(piece.encode()) for piece in pieces) <= size


def test_max_bytes_cuts_at_a_character() -> None:
    documents = [sources.Document(str(i), ["aé", "bc"]) for i in range(3)]
    found = {d.name: "".join(d.chunks) for d in limited(documents, 7)}
    assert found == {"0": "aébc", "1": "a"}
    assert len(list(limited(documents, 0))) == 3


def test_unknown_source_names_the_choices() -> None:
    with pytest.raises(UserError, match="stdlib, text, hf"):
        build_source(OmegaConf.create({"name": "web"}))
