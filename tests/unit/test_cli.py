"""The command line in fresh processes: exit codes, messages and start-up time."""

from __future__ import annotations

import os
import sys
import types

import pytest

from gsa_platform import cli as cli_module
from gsa_platform import launch as launch_module
from gsa_platform import sweep as sweep_module

BROKEN = "raise ImportError('no libacme here')\n"


@pytest.mark.parametrize(
    "arguments", [["plugins", "list"], ["--cfg", "job", "experiment=gsa_128k"]]
)
def test_fast_start_without_torch(arguments):
    import subprocess

    code = (
        "import sys; from gsa_platform.cli import main; rc = main(sys.argv[1:]);"
        "heavy = {'torch', 'mlflow', 'lightning', 'rich'} & set(sys.modules);"
        "sys.exit(rc or (3 if heavy else 0))"
    )
    seconds = []
    for _ in range(3):  # processor time, and the best of three: others may hold the cores
        start = os.times()
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True)
        end = os.times()
        seconds.append(sum(end[2:4]) - sum(start[2:4]))
        assert done.returncode == 0, done.stderr.decode()
    assert min(seconds) < 1.5


def test_version_and_help(cli):
    assert cli("--version").stdout.startswith("gsa-platform 0.")
    text = cli("--help").stdout
    for part in ("experiment=gsa_128k", "plugins list", "gated_lightning", "--multirun"):
        assert part in text
    assert cli("help").stdout == text


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["plugns"], ["Did you mean 'plugins'", "check"]),
        (["experiment=gsa_12k"], ["Did you mean 'gsa_128k'"]),
        (["-m", "experiment=smok"], ["Did you mean 'smoke'"]),
        (["-m", "attention=dens,gsa"], ["Did you mean 'dense'"]),
        (["plugins", "lst"], ["Did you mean 'list'"]),
        (["plugins", "show"], ["plugins show NAME"]),
        (["plugins", "show", "gsaa"], ["Did you mean 'gsa'"]),
        (["experiment=smoke", "train.steps=0"], ["train.steps=0"]),
        (["check", "--resolve"], ["--resolve"]),
        (["--cfg", "job", "--package", "trian"], ["Did you mean 'train'"]),
    ],
)
def test_user_errors_are_one_clean_message(cli, arguments, parts):
    done = cli(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr


def test_full_error_shows_the_traceback(cli):
    done = cli("experiment=smok", GSA_FULL_ERROR="1")
    assert done.returncode == 2 and "Traceback" in done.stderr


def test_config_is_shown_resolved_and_leaves_no_files(cli, tmp_path):
    done = cli("--cfg", "job", "experiment=smoke", "attention=dense", "--package", "sparsity")
    assert done.returncode == 0
    assert done.stdout == "# @package sparsity\nname: none\n"
    notes = cli("--cfg", "job", "experiment=smoke", "attention=dense", "-p", "notes").stdout
    assert "takes no selection" in notes
    assert cli("--info", "searchpath").returncode == 0
    assert list((tmp_path / "work").iterdir()) == []


def test_broken_plugin_is_shown_once_and_listed(cli, plugin):
    site = plugin("broken_one", BROKEN)
    listed = cli("plugins", "list", site=site)
    assert listed.returncode == 0
    assert listed.stderr.count("no libacme here") == 1
    assert "broken: ImportError: no libacme here" in listed.stdout
    asked = cli("attention=broken_one", site=site)
    assert asked.returncode == 2 and "offers it but failed to load" in asked.stderr
    strict = cli("plugins", "list", site=site, GSA_STRICT_PLUGINS="1")
    assert strict.returncode == 2 and "GSA_STRICT_PLUGINS" in strict.stderr


def test_conflict_is_listed_and_stops_a_run(cli, plugin):
    plugin("first", name="gsa")
    site = plugin("second", name="dense")
    listed = cli("plugins", "list", site=site)
    assert listed.returncode == 0 and listed.stdout.count("conflict:") == 2
    run = cli("--cfg", "job", site=site)
    assert run.returncode == 2 and "GSA_DISABLE_PLUGINS=" in run.stderr
    off = cli("--cfg", "job", site=site, GSA_DISABLE_PLUGINS="first,second")
    assert off.returncode == 0


def test_third_party_component_and_its_yaml(cli, plugin):
    site = plugin("acme_pkg")
    package = site / "acme_pkg"
    (package / "conf" / "experiment").mkdir(parents=True)
    (site / "acme_pkg.py").rename(package / "__init__.py")
    for folder in (package / "conf", package / "conf" / "experiment"):
        (folder / "__init__.py").write_text("")
    (package / "conf" / "experiment" / "acme_32k.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /attention: acme_pkg\n  - _self_\n"
        "name: acme_32k\ncontext: 32768\n"
    )
    done = cli("--cfg", "job", "experiment=acme_32k", "attention.top_k=8", site=site)
    assert done.returncode == 0, done.stderr
    assert "context: 32768" in done.stdout and "top_k: 8" in done.stdout
    shown = cli("plugins", "show", "acme_pkg", site=site).stdout
    for part in ("acme_pkg-dist 1.2", "attention.top_k=64", "keys per query", "acme_pkg:Built"):
        assert part in shown


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    """Replace the launcher; returns the (seed, sweep) pairs it was called with."""
    calls: list[tuple[int, object]] = []

    def launch(cfg, sweep=None):
        calls.append((cfg.seed, sweep))
        if cfg.seed == 3:
            raise RuntimeError("job failed")
        if cfg.seed == 143:
            raise SystemExit(143)
        if cfg.seed == 130:
            raise KeyboardInterrupt
        return {"loss": 1.0}

    ended = types.SimpleNamespace(status=None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch_module, "launch", launch)
    monkeypatch.setattr(sweep_module, "new_sweep_folder", lambda cfg: tmp_path / "sweep")
    monkeypatch.setattr(sweep_module, "finish_sweep", lambda f, s: setattr(ended, "status", s))
    return types.SimpleNamespace(calls=calls, ended=ended, folder=tmp_path)


def test_single_run(jobs, capsys):
    assert cli_module.main(["experiment=smoke", "attention=dense", "seed=5"]) == 0
    assert jobs.calls == [(5, None)]
    assert "attention=dense takes no selection" in capsys.readouterr().out


@pytest.mark.parametrize(("seed", "code"), [(3, 1), (130, 130), (143, 143)])
def test_exit_codes(jobs, seed, code):
    assert cli_module.main(["experiment=smoke", f"seed={seed}"]) == code


def test_failed_job_does_not_stop_a_sweep(jobs, capsys):
    code = cli_module.main(["-m", "experiment=smoke", "attention=gsa_16,dense", "seed=3,4"])
    assert code == 1
    assert [seed for seed, _ in jobs.calls] == [3, 4, 3, 4]
    assert [sweep.job for _, sweep in jobs.calls] == [0, 1, 2, 3]
    assert {str(sweep.folder) for _, sweep in jobs.calls} == {str(jobs.folder / "sweep")}
    assert jobs.ended.status == "FAILED"
    assert "2 of 4 jobs finished" in capsys.readouterr().out
    assert list(jobs.folder.iterdir()) == []


def test_fail_fast_stops_a_sweep(jobs):
    code = cli_module.main(["-m", "experiment=smoke", "seed=3,4", "sweep.fail_fast=true"])
    assert code == 1 and len(jobs.calls) == 1 and jobs.ended.status == "FAILED"


def test_good_and_interrupted_sweeps(jobs):
    assert cli_module.main(["-m", "experiment=smoke", "seed=4,5"]) == 0
    assert jobs.ended.status == "FINISHED"
    assert cli_module.main(["-m", "experiment=smoke", "seed=130,5"]) == 130
    assert jobs.ended.status == "KILLED"
    assert [seed for seed, _ in jobs.calls] == [4, 5, 130]
