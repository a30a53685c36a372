"""The study of token mode's choice runs, and sees what it is to see."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
from test_query_gathering import STUDY
from test_triton_filter import short_lists  # noqa: F401

from gsa_kernels.selection import SelectionSpec

pytest.importorskip("triton")

pytestmark = pytest.mark.kernel


def test_the_command(short_lists, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.syspath_prepend(str(STUDY))
    study = importlib.import_module("token_selection")
    file = tmp_path / "out.json"
    monkeypatch.setattr(
        sys, "argv", ["token_selection.py", "--seq-len", "90", "--k", "24", "--heads", "2",
                      "--width", "16", "--dtype", "float16", "--seconds", "0", "--alone", "3",
                      "--kinds", "random", "equal", "--rules", "entropy", "--out", str(file)],
    )  # fmt: skip
    monkeypatch.setattr(study, "SPEC", SelectionSpec(1, 1, window=7, sinks=2))
    short_lists(places=64)
    try:
        study.main()
    finally:
        sys.modules.pop("token_selection")
    even, equal, rule = json.loads(file.read_text())["records"]
    assert even["equal_choice"] and equal["equal_choice"]
    assert 0 <= even["again"] < equal["again"] < 1  # of equal scores all reach the threshold
    assert even["lists_ms"] > 0 and even["written_ms"] > 0
    assert rule["rule_ms"] > 0 and rule["statistics_ms"] > 0 and rule["alone_differs"] == 0
