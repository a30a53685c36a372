"""The study of hardware counters: its table is read right, and what it would count runs. Those of
token mode's tile sizes and traffic run."""

import importlib
import json
import sys
from pathlib import Path

import pytest

STUDY = Path(__file__).parents[2] / "experiments" / "speed"
HEAD = (
    '"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","lts__t_bytes.sum",'
    '"dram__throughput.avg.pct_of_peak_sustained_elapsed",'
    '"sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active"'
)


@pytest.fixture
def study(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(STUDY))
    yield importlib.import_module("counters")
    names = ("counters", "token_attention", "token_launches", "query_gathering", "union_traffic")
    for name in names:
        sys.modules.pop(name, None)


def test_launches_of_a_kernel_are_added_up_and_shares_weighted_by_time(study):
    rows = [
        '"0","sum_kernel","1,000,000","2,000,000,000","4e9","50","10"',
        '"1","parts_kernel","9,000,000","0","0","5","90"',
        '"2","sum_kernel","3,000,000","1,000,000,000","n/a","90","30"',
    ]
    text = "\n".join(["==PROF== Connected", HEAD, '"","","ns","byte","byte","%","%"', *rows])
    parts, sums = study.kernels_of(text)
    assert (parts["kernel"], parts["launches"], parts["ms"]) == ("parts_kernel", 1, 9)
    assert sums == pytest.approx(
        {"kernel": "sum_kernel", "launches": 2, "ms": 4, "dram_read_gb": 3, "l2_gb": 4,
         "dram": 0.8, "tensor": 0.25}
    )  # fmt: skip


def test_no_table_is_an_error(study):
    with pytest.raises(SystemExit, match="no permission"):
        study.kernels_of("==PROF== Connected\n==ERROR== no permission")


@pytest.mark.kernel
def test_what_is_counted_runs(study, monkeypatch, tmp_path):
    from gsa_kernels.sparse_attention import triton_config

    for name in ("GATHER_FROM", "GATHER_BACKWARD_FROM"):
        monkeypatch.setattr(triton_config, name, getattr(triton_config, name))  # set by the study
    monkeypatch.chdir(tmp_path)
    arguments = ["--dry", "--seq-len", "128", "--passes", "backward", "--designs", "gathering"]
    monkeypatch.setattr(sys, "argv", ["counters.py", *arguments])
    study.main()
    assert triton_config.GATHER_FROM == triton_config.GATHER_BACKWARD_FROM == 0


def records_of(module, monkeypatch, tmp_path, *arguments):
    """What a study of single keys writes, over 250 tokens of index queries that change fast."""
    file = tmp_path / "out.json"
    sizes = ["--memory", "8", "--seq-len", "250", "--out", str(file)]
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *sizes, *arguments])
    module.main()
    return json.loads(file.read_text())["records"]


@pytest.mark.kernel
def test_tile_sizes_of_token_mode(study, monkeypatch, tmp_path):
    from gsa_kernels.sparse_attention import triton_config

    before = triton_config.forward, triton_config.query_gradient
    sizes = importlib.import_module("token_launches")
    small = {name: [(16, 32, 16, 4, 2), (32, 32, 32, 4, 2)] for name in sizes.VARIANTS}
    monkeypatch.setattr(sizes, "VARIANTS", small)
    rows = records_of(sizes, monkeypatch, tmp_path, "--k", "64")
    assert [row["kernel"] for row in rows] == ["forward"] * 2 + ["query_gradient"] * 2
    assert all(row["ms"] > 0 and row["difference"] < 1e-2 for row in rows)
    assert all(1 <= rows[i]["unions"] < rows[i + 1]["unions"] < 32 for i in (0, 2))
    assert (triton_config.forward, triton_config.query_gradient) == before


@pytest.mark.kernel
def test_traffic_of_unions(study, monkeypatch, tmp_path):
    traffic = importlib.import_module("union_traffic")
    added = []

    def walk(tensors, unions, load, add):
        for x in tensors[2:]:
            x.zero_()
        original(tensors, unions, load, add)
        added.append([float(x.abs().sum()) for x in tensors[2:]])

    original = traffic.walk
    monkeypatch.setattr(traffic, "walk", walk)
    rows = records_of(traffic, monkeypatch, tmp_path, "--k", "160")
    assert [row["queries"] for row in rows] == [16] * 3 + [32] * 3
    assert rows[0]["entries"] > rows[3]["entries"] > 0
    assert all(row["ms"] > 0 and row["bytes_s"] > 0 for row in rows)
    # Entries past the first step of a list add its number; loading alone adds nothing.
    assert {total == [0, 0] for total in added} == {True, False}
    assert all(dk == dv for dk, dv in added)
