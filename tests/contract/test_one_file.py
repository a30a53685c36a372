"""A first try without packaging: one file, typed settings, checked, shown and trained with."""

from __future__ import annotations

import pytest

SOURCE = """
from dataclasses import dataclass

import torch
from gsa_platform import Component, Trial, hookimpl
from gsa_platform.contracts import Gate, GateValues


@dataclass
class MineConfig:
    name: str = "mine"
    scale: float = 2.0  # largest multiplier


@hookimpl
def gsa_register_gate():
    return Component("mine", "my_plugin:Mine", MineConfig, "One scaled gate per head")


class Mine(Gate):
    def __init__(self, config, dims):
        super().__init__()
        self.scale, self.proj = config.scale, torch.nn.Linear(dims.d_model, dims.n_heads)

    def forward(self, x_BTD):
        return GateValues(output_BTHE=self.scale * self.proj(x_BTD).sigmoid()[..., None])
"""
HERE = "plugins_path=./my_plugin.py"


@pytest.fixture
def here(cli, tmp_path):
    (tmp_path / "work" / "my_plugin.py").write_text(SOURCE)
    return cli


def test_it_is_listed_and_shown(here):
    assert "my_plugin.py" in here("plugins", "list", HERE).stdout
    shown = here("plugins", "show", "mine", HERE).stdout
    assert "gate.scale=2.0  largest multiplier" in shown
    again = here("plugins", "show", "mine", GSA_PLUGIN_PATH="./my_plugin.py")
    assert again.stdout == shown


def test_its_settings_are_typed(here):
    good = here(HERE, "gate=mine", "gate.scale=3", "--cfg", "job", "-p", "gate")
    assert good.stdout == "# @package gate\nname: mine\nscale: 3.0\n"
    for setting, words in (("gate.scale=big", "scale"), ("gate.scal=1", "Did you mean 'scale'")):
        wrong = here("check", "gate=mine", setting, HERE)
        assert wrong.returncode == 2 and words in wrong.stderr


def test_it_is_checked(here):
    done = here("plugins", "check", "mine", "scale=1.5", HERE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gate=mine: " in done.stdout and "FAILED" not in done.stdout
    assert here("plugins", "matrix", "gate=mine", "attention=dense", HERE).returncode == 0


def test_a_failing_check_is_explained(here, tmp_path):
    wrong = SOURCE.replace("[..., None]", ".flip(1)[..., None]")
    (tmp_path / "work" / "my_plugin.py").write_text(wrong)
    done = here("plugins", "check", "mine", HERE)
    assert done.returncode == 1
    assert "changing tokens 1.. of 100 (training) moved the output of position 0" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mine", "scale=x"], "scale"),
        (["mine", "scal=1"], "scal"),
        (["min"], "Did you mean 'mine'"),
        ([], "plugins check NAME"),
        (["bias", "--slot", "gate"], "Unknown gate 'bias'"),
        (["none"], "--slot "),
        (["mine", "--fast"], "no flag --fast"),
    ],
)
def test_what_check_refuses(here, arguments, words):
    done = here("plugins", "check", *arguments, HERE)
    assert done.returncode == 2 and words in done.stderr, done.stdout + done.stderr


def test_it_trains(here, tmp_path):
    smoke = ["experiment=smoke", "context=128", "train.steps=1", "tracking=none"]
    done = here(*smoke, "gate=mine", "attention=dense", HERE, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "gate=mine" in done.stdout
