"""`bench`: from the command line to the report."""

from __future__ import annotations

import json

import pytest

from gsa_platform.cli import main

FIELDS = {
    "mode", "pass", "batch", "seq_len", "heads", "kv_heads", "head_dim", "k", "inputs",
    "dense_backend", "dense_ms", "score_ms", "select_ms", "attend_ms", "ours_ms", "ratio",
    "host_ms", "peak_extra_bytes", "attend_extra_bytes", "C", "R", "roofline",
    "flops_share", "bytes_share",
}  # fmt: skip
SMALL = ["--heads", "2", "--kv-heads", "1", "--head-dim", "16", "--k", "96", "--window", "20",
         "--sinks", "8", "--key-block", "16", "--query-tile", "16", "--device", "cpu", "--seconds",
         "0.001"]  # fmt: skip

THIRD_PARTY = """
from dataclasses import dataclass
from gsa_platform import BenchmarkSettings, Extension, hookimpl
from gsa_platform.bench import Benchmark

@dataclass
class CountSettings(BenchmarkSettings):
    to: int = 3  # where to stop

@hookimpl
def gsa_register_benchmark():
    return Extension("count", "counting:Count", CountSettings, "Counts")

class Count(Benchmark):
    def run(self, progress):
        progress.say("counting")
        if self.settings.to < 0:
            raise ValueError("a mistake of ours")
        return {"records": [{"n": n} for n in range(self.settings.to)]}
"""


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def records(name):
    return json.loads(open(name).read())["records"]


def test_attention(capsys):
    words = ["--seq-len", "96", "--passes", "forward,forward_backward,decode"]
    assert main(["bench", "attention", *SMALL, *words, "--decode-batch", "1", "2"]) == 0
    report = json.loads(open("bench-attention.json").read())
    for key in ("device", "driver", "torch", "triton", "commit", "command"):
        assert report[key]
    assert report["checked"]["C=16 R=16 K=1"]["dq"] <= 2
    rows = report["records"]
    assert [(r["pass"], r["batch"]) for r in rows] == [
        ("forward", 1), ("forward_backward", 1), ("decode", 1), ("decode", 2),
    ]  # fmt: skip
    for row in rows:
        assert row.keys() >= FIELDS and row["ratio"] == row["dense_ms"] / row["ours_ms"]
        assert min(row[name] for name in ("dense_ms", "attend_ms", "score_ms", "ours_ms")) > 0
    shown = capsys.readouterr()
    assert "forward+backward" in shown.out and "written bench-attention.json" in shown.out
    assert shown.err.count("dense") == 4  # a line for each case


def test_side_by_side(capsys):
    words = ["--seq-len", "96", "--passes", "forward_backward", "--out", "side.json"]
    others = ["--beside", "flex,fla,attn_gym"]
    assert main(["bench", "attention", *SMALL, *words, *others]) == 0
    (row,) = records("side.json")
    assert row["beside"]["flex"]["ms"] > 0 and row["beside"]["flex"]["error"] < 1e-4
    shown = capsys.readouterr().out
    for name in ("fla", "attn_gym"):
        assert "ms" not in row["beside"][name] and row["beside"][name]["reason"] in shown


def test_indexer():
    words = [
        "--seq-len",
        "256",
        "--pool",
        "32",
        "64",
        "--survivors",
        "1",
        "2",
        "--dense-rows",
        "2",
    ]
    assert main(["bench", "indexer", *SMALL, *words]) == 0
    by = {}
    for row in records("bench-indexer.json"):
        by.setdefault(row["pass"], []).append(row)
    assert by["select"][0]["overlap"] > 0.95 and by["select"][0]["topk_ms"] > 0
    assert by["objective"][0]["dense_kl_ms"] > 0 and by["objective"][0]["selected_kl_ms"] > 0
    fine = {(r["pooling"], r["pool"], r["survivors"]): r for r in by["hierarchical"]}
    assert len(fine) == 8
    assert fine["mean", 32, 1]["recall"] < fine["mean", 64, 2]["recall"] <= 1
    assert all(("proven" in row) == (pooling == "bound") for (pooling, *_), row in fine.items())
    for row in (fine["bound", pool, n] for pool in (32, 64) for n in (1, 2)):
        assert 0 < row["nothing_left_out"] <= row["proven"] <= 1


def test_index_keys_of_a_byte():
    words = ["--seq-len", "1000", "--pool", "32", "--survivors", "10", "--pooling", "mean"]
    words += ["--dense-rows", "2", "--key-dtype", "auto", "fp8"]
    assert main(["bench", "indexer", *SMALL, *words]) == 0
    by = {(row["key_dtype"], row["pass"]): row for row in records("bench-indexer.json")}
    assert len(by) == 6 and "recall" not in by["auto", "select"]
    assert 0.9 < by["fp8", "select"]["recall"] < 1
    assert by["fp8", "hierarchical"]["recall"] > 0.5
    assert by["fp8", "objective"]["selected_kl_ms"] > 0
    words = ["--seq-len", "96", "--passes", "decode", "--decode-batch", "1"]
    assert main(["bench", "attention", *SMALL, *words, "--key-dtype", "fp8"]) == 0
    assert {row["key_dtype"] for row in records("bench-attention.json")} == {"fp8"}


def test_nothing_is_timed_of_a_wrong_result(monkeypatch, capsys, tmp_path):
    from gsa_kernels.sparse_attention import eager

    right = eager.attend
    monkeypatch.setattr(eager, "attend", lambda q, k, v, *rest: right(q, k * 1.01, v, *rest))
    assert main(["bench", "attention", *SMALL, "--seq-len", "96"]) == 1
    text = capsys.readouterr().err
    assert "is wrong by" in text and "Nothing was timed" in text and "Traceback" not in text
    assert not (tmp_path / "bench-attention.json").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["bench NAME", "attention", "indexer"]),
        (["attenton"], ["Did you mean 'attention'", "capture, indexer"]),
        (["attention", "--mode", "tiles"], ["Did you mean 'tile'"]),
        (["attention", "--lengths", "8"], ["Options:", "--seq-len"]),
        (["attention", "--key-block", "300"], ["--key-block=300", "1 to 128"]),
        (["attention", "--kv-heads", "3", "--heads", "4"], ["do not divide"]),
        (["attention", "--inputs", "checkpoint"], ["--checkpoint PATH"]),
        (["attention", "--impl", "triton", "--device", "cpu", "--mode", "token"], ["triton"]),
        (["indexer", "--survivors", "0"], ["at least 1"]),
        (["indexer", "--survivor-keys", "0"], ["at least 1"]),
        (["indexer", "--seq-len", "256", "--queries", "65"], ["whole query tiles of 64"]),
        (["indexer", "--layer", "-2"], ["at least -1"]),
        (["indexer", "--layer", "0", "1"], ["--checkpoint PATH"]),
        (["attention", "--sequences", "2"], ["--checkpoint PATH"]),
        (["capture"], ["--checkpoint PATH"]),
    ],
)
def test_bad_input_is_refused(words, parts, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["bench", *words]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and all(part in text for part in parts)


def test_help(capsys):
    assert main(["bench", "--help"]) == 0 and "indexer" in capsys.readouterr().out
    assert main(["bench", "attention", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--beside" in text and "same selection" in text and "forward_backward" in text


def test_a_third_party_adds_one(cli, tmp_path):
    (tmp_path / "counting.py").write_text(THIRD_PARTY)
    done = cli("bench", "count", "--to", "2", GSA_PLUGIN_PATH=str(tmp_path / "counting.py"))
    assert done.returncode == 0, done.stderr
    assert "n 1" in done.stdout and "counting" in done.stderr
    saved = json.loads((tmp_path / "work" / "bench-count.json").read_text())
    assert saved == {
        "records": [{"n": 0}, {"n": 1}],
        "command": "python -m gsa_platform bench count --to 2",
    }


def test_inputs_of_a_trained_layer(cli, tmp_path, capsys):
    small = ["experiment=smoke", "context=128", "train.steps=1", "tracking=none"]
    done = cli(*small, "train.val_batches=1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "work" / "runs" / "smoke").iterdir()
    assert main(["bench", "capture", "--checkpoint", str(run), "--device", "cpu"]) == 0
    assert "index_q_BTJI" in capsys.readouterr().out
    rest = ["--inputs", "checkpoint", "--k", "64", "--window", "20", "--sinks", "8", "--key-block",
            "16", "--device", "cpu", "--seconds", "0.001"]  # fmt: skip
    file = ["--checkpoint", "captured.pt", "--passes", "forward_backward", "decode"]
    words = ["--seq-len", "128", *file, "--decode-batch", "1"]
    assert main(["bench", "attention", *rest, *words]) == 0
    rows = records("bench-attention.json")
    assert {r["inputs"] for r in rows} == {"checkpoint"} and rows[0]["heads"] == 2
    several = ["--checkpoint", str(run), "--layer", "0", "1", "--sequences", "2", "--batch", "2"]
    words = [
        "--queries",
        "64",
        "--query-tile",
        "16",
        "--pool",
        "16",
        "32",
        "--survivor-keys",
        "32",
    ]
    words += ["--survivor-keys", "32", "--dense-rows", "0", "--key-dtype", "auto", "bf16"]
    assert main(["bench", "indexer", *rest, "--seq-len", "128", *several, *words]) == 0
    rows = records("bench-indexer.json")
    assert [r["layer"] for r in rows] == [0] * 10 + [1] * 10
    fine = [r for r in rows if r["pass"] == "hierarchical"]
    assert {(r["pool"], r["survivors"]) for r in fine} == {(16, 2), (32, 1)}
    assert all(0 < r["mass"] <= r["mass_best"] and 0 < r["cost"] < 3 for r in fine)
    assert main(["bench", "attention", *rest, "--seq-len", "256", *file]) == 2
    assert "holds 128 tokens, not 256" in capsys.readouterr().err
    assert main(["bench", "attention", *rest, "--checkpoint", str(run / "config.yaml")]) == 2
