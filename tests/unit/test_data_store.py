"""Token store: round trip, checksums, crashes, races and a full disk."""

import errno
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest

from gsa_platform.data import store as store_module
from gsa_platform.data.sources import FileSource, text_source
from gsa_platform.data.store import CorruptStore, TokenStore, ensure_store, open_store
from gsa_platform.data.tokenizers import BytesTokenizer
from gsa_platform.errors import UserError

TEXTS = {"a.txt": "hello\n", "b.txt": "zwölf", "c.txt": "x" * 3000}


@pytest.fixture
def source(tmp_path: Path) -> FileSource:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return text_source([str(folder)])


def build(source: FileSource, cache: Path, verify: bool = False) -> TokenStore:
    return ensure_store(source, BytesTokenizer(), cache, verify)


def leftovers(cache: Path) -> list[str]:
    return sorted(p.name for p in (cache / "tokens").iterdir() if p.name.startswith("."))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_round_trip(source: FileSource, tmp_path: Path) -> None:
    store = build(source, tmp_path)
    assert store.names == list(TEXTS)
    assert store.tokens.dtype == np.uint16
    for i, text in enumerate(TEXTS.values()):
        tokens = store.tokens[store.offsets[i] : store.offsets[i + 1]]
        assert tokens[0] == 256
        assert BytesTokenizer().decode(tokens[1:]) == text
    assert store.offsets[-1] == len(store.tokens) == store.meta["tokens"]
    assert store.meta["bytes"] == sum(len(text.encode()) for text in TEXTS.values())
    assert store.meta["documents"] == 3
    assert leftovers(tmp_path) == []


def test_long_documents_are_joined(source: FileSource, tmp_path: Path, monkeypatch) -> None:
    whole = np.array(build(source, tmp_path / "one").tokens)
    monkeypatch.setattr("gsa_platform.data.sources.CHUNK_BYTES", 100)
    monkeypatch.setattr(store_module, "BATCH_CHARACTERS", 250)
    store = build(source, tmp_path / "two")
    np.testing.assert_array_equal(store.tokens, whole)
    assert store.meta["documents"] == 3


def test_second_call_opens_without_reading_the_source(
    source: FileSource, tmp_path: Path, monkeypatch, capsys
) -> None:
    first = build(source, tmp_path)
    assert "tokenised text: 0.0 MB, 3 documents" in capsys.readouterr().err
    monkeypatch.setattr(store_module, "_build", None)
    assert build(source, tmp_path, verify=True).folder == first.folder
    assert capsys.readouterr().err == ""


def test_dtype_follows_the_vocabulary(source: FileSource, tmp_path: Path) -> None:
    class Wide(BytesTokenizer):
        vocab_size = 70_000
        bos_id = 69_999
        fingerprint = "wide"

    store = ensure_store(source, Wide(), tmp_path)
    assert store.tokens.dtype == np.uint32 and store.tokens[0] == 69_999
    assert store_module._smallest_dtype(256) == np.uint8
    assert store_module._smallest_dtype(65_536) == np.uint16


@pytest.mark.parametrize("file", ["tokens.bin", "documents.npy", "names.txt", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "shorten", "remove"])
def test_corruption_is_detected_and_rebuilt(
    source: FileSource, tmp_path: Path, capsys, file: str, damage: str
) -> None:
    store = build(source, tmp_path)
    path = store.folder / file
    if damage == "flip":
        flip(path, 0)
    elif damage == "shorten":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with pytest.raises(CorruptStore):
        open_store(store.folder)
    capsys.readouterr()
    again = build(source, tmp_path)
    assert capsys.readouterr().err.count("rebuilding the token store") == 1
    assert BytesTokenizer().decode(again.tokens[1:6]) == "hello"
    assert leftovers(tmp_path) == []


def test_damage_in_the_middle_needs_the_full_check(
    source: FileSource, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(store_module, "_END_BYTES", 100)
    store = build(source, tmp_path)
    flip(store.folder / "tokens.bin", 1000)
    open_store(store.folder)
    with pytest.raises(CorruptStore, match=r"tokens\.bin"):
        open_store(store.folder, verify=True)


def test_a_crash_while_building_leaves_nothing_in_use(
    source: FileSource, tmp_path: Path, monkeypatch
) -> None:
    context = multiprocessing.get_context("fork")
    with monkeypatch.context() as patch:
        # os._exit skips every cleanup, as SIGKILL does.
        patch.setattr(store_module, "_write", lambda handle, data: store_module.os._exit(9))
        process = context.Process(target=build, args=(source, tmp_path))
        process.start()
        process.join(90)
    assert process.exitcode == 9
    assert len(leftovers(tmp_path)) == 1
    store = build(source, tmp_path)
    assert BytesTokenizer().decode(store.tokens[1:6]) == "hello"
    assert leftovers(tmp_path) == []


def test_processes_that_race_build_once(source: FileSource, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()

    def work() -> None:
        builds = []
        original = store_module._build
        store_module._build = lambda *args: builds.append(1) or original(*args)
        barrier.wait(90)
        results.put((len(builds), int(build(source, tmp_path).tokens.sum()), len(builds)))

    processes = [context.Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=90) for _ in processes]
    for process in processes:
        process.join(90)
    assert sum(after for _, _, after in found) == 1
    assert len({total for _, total, _ in found}) == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_cleans_up_and_names_the_numbers(
    source: FileSource, tmp_path: Path, monkeypatch, code: int
) -> None:
    def full(handle, data) -> None:
        raise OSError(code, "no space")

    monkeypatch.setattr(store_module, "_write", full)
    need = f"{2 * sum(len(text.encode()) for text in TEXTS.values()):,}"
    with pytest.raises(UserError, match=r"data\.cache_dir=") as error:
        build(source, tmp_path)
    assert str(tmp_path / "tokens") in str(error.value)
    assert need in str(error.value)
    assert "are free" in str(error.value)
    assert [p.suffix for p in (tmp_path / "tokens").iterdir()] == [".lock"]


def test_a_new_store_is_read_back_before_it_is_used(
    source: FileSource, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(store_module, "_END_BYTES", 100)
    damaged = bytearray()

    def write(handle, data: bytes) -> None:
        damaged[:] = data
        damaged[1000] ^= 1
        handle.write(damaged)

    monkeypatch.setattr(store_module, "_write", write)
    with pytest.raises(UserError, match="does not keep what is written"):
        build(source, tmp_path)
    assert [p.suffix for p in (tmp_path / "tokens").iterdir()] == [".lock"]


def test_unusable_cache_folder_is_a_user_error(source: FileSource, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir="):
        build(source, tmp_path / "file")


def test_a_source_without_text_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text"):
        build(FileSource("text", (), "none"), tmp_path)
    assert [p.suffix for p in (tmp_path / "tokens").iterdir()] == [".lock"]


def test_pickling_leaves_the_tokens_on_disk(source: FileSource, tmp_path: Path) -> None:
    store = build(source, tmp_path)
    data = pickle.dumps(store)
    assert len(data) < store.tokens.nbytes
    np.testing.assert_array_equal(pickle.loads(data).tokens, store.tokens)
