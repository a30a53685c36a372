"""`runs list` and `runs doctor`, on runs whose processes were killed outright."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient
from omegaconf import OmegaConf

from gsa_platform import cli
from gsa_platform.runs import outcome
from gsa_platform.tracking import create_run, open_database
from gsa_platform.tracking.process import HOST_TAG

WAIT = """
import time
from pathlib import Path

def wait(cfg):
    (Path(cfg.run_dir) / "started").touch()
    time.sleep(600)
"""
CODE = """
import json, sys
from omegaconf import OmegaConf
from gsa_platform.launch import launch

launch(OmegaConf.load(sys.argv[1]), target="wait_stub:wait", inline=json.loads(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Folders of two runs under one output root: trained by their process, and by a worker."""
    root = tmp_path_factory.mktemp("killed")
    (root / "wait_stub.py").write_text(WAIT)
    uri = open_database(f"sqlite:///{root}/runs/mlflow.db").uri
    processes = []
    for name, inline in (("inline", True), ("worker", False)):
        tracking = {"name": "mlflow", "uri": uri, "system_metrics": False, "tags": {}}
        tracking |= {"run_id": None, "parent_run_id": None}
        cfg = {
            "name": name,
            "output_root": f"{root}/runs",
            "train": {"resume": None},
            "trainer": {"devices": 1, "accelerator": "cpu"},
            "tracking": tracking,
        }
        OmegaConf.save(OmegaConf.create(cfg), root / f"{name}.yaml")
        command = [sys.executable, "-c", CODE, str(root / f"{name}.yaml"), json.dumps(inline)]
        python_path = f"{root}{os.pathsep}{Path(__file__).parents[2]}"
        processes.append(
            subprocess.Popen(
                command, env=os.environ | {"PYTHONPATH": python_path}, stderr=subprocess.DEVNULL
            )
        )
    limit = time.time() + 180
    while len(list((root / "runs").glob("*/*/started"))) < 2:
        assert time.time() < limit and all(process.poll() is None for process in processes)
        time.sleep(0.05)
    yield tuple(next((root / "runs" / name).iterdir()) for name in ("inline", "worker"))
    for process in processes:
        process.kill()
        process.wait()


def doctor(root: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["runs", "doctor", f"output_root={root}", *arguments]) == 0
    return capsys.readouterr().out


def listed(root: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Status of each run by its name."""
    assert cli.main(["runs", "list", f"output_root={root}"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    return {Path(row[-1]).parent.name: row[0] for row in rows if row[1][:2] == "20"}


def test_killed_runs_are_seen_and_closed(
    killed: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    inline = killed[0]
    root = inline.parents[1]
    database, locks = root / "mlflow.db", [folder / ".lock" for folder in killed]
    assert listed(root, capsys) == {"inline": "RUNNING", "worker": "RUNNING"}
    assert "nothing to do" in doctor(root, capsys, "--fix")

    parents = [child for child in psutil.Process().children() if CODE in child.cmdline()]
    (orphan,) = [grandchild for parent in parents for grandchild in parent.children()]
    for parent in parents:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert listed(root, capsys) == {"inline": "STALE", "worker": "RUNNING"}
    told = doctor(root, capsys)
    assert f"stop: kill {orphan.pid}" in told and f"stale    {inline}" in told

    orphan.kill()
    while orphan.is_running() and orphan.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)
    before = hashlib.sha256(database.read_bytes()).digest()
    told = doctor(root, capsys)
    assert told.count(" is gone") == 2 and "nothing was changed" in told
    assert hashlib.sha256(database.read_bytes()).digest() == before
    assert all(lock.exists() for lock in locks)

    assert doctor(root, capsys, "--fix", str(inline)).count("closed as KILLED") == 1
    assert listed(root, capsys) == {"inline": "KILLED", "worker": "STALE"}
    assert doctor(root, capsys, "--fix").count("closed as KILLED") == 1
    assert listed(root, capsys) == {"inline": "KILLED", "worker": "KILLED"}
    assert not any(lock.exists() for lock in locks)
    assert "nothing to do" in doctor(root, capsys, "--fix")
    # It ended when it last wrote something, not when it was closed.
    run = MlflowClient(f"sqlite:///{database}").get_run(
        json.loads((inline / "run.json").read_text())["run_id"]
    )
    last = max(path.stat().st_mtime for path in inline.iterdir())
    assert run.info.end_time == int(1000 * last)


def test_a_run_of_another_machine_is_left_alone_unless_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database = open_database(f"sqlite:///{tmp_path}/mlflow.db")
    folder = tmp_path / "far" / "run"  # killed before the folder said anything
    folder.mkdir(parents=True)
    tracking = {"uri": database.uri, "tags": {}, "run_id": None}
    run_id = create_run(OmegaConf.create({"name": "far", "tracking": tracking}), folder, database)
    database.client().set_tag(run_id, HOST_TAG, "elsewhere")
    assert listed(tmp_path, capsys) == {"far": "RUNNING?"}
    told = doctor(tmp_path, capsys, "--fix")
    assert "started on elsewhere" in told and "closed" not in told
    assert "closed as KILLED" in doctor(tmp_path, capsys, "--fix", str(folder))
    assert database.client().get_run(run_id).info.status == "KILLED"


@pytest.mark.parametrize(
    ("files", "status"),
    [
        ({}, "KILLED"),
        ({"error.json": {"kind": "killed"}}, "KILLED"),
        ({"error.json": {"kind": "failure"}}, "FAILED"),
        ({"result.json": {"loss": 1.0}}, "FINISHED"),
    ],
)
def test_the_folder_tells_how_it_ended(
    tmp_path: Path, files: dict[str, dict[str, object]], status: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert outcome(tmp_path) == status


def test_runs_without_a_store_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "plain" / "run"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"run_id": null, "name": "plain"}')
    (folder / "result.json").write_text('{"val_loss": 2.5}')
    assert listed(tmp_path, capsys) == {"plain": "FINISHED"}
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "plain", "result.json", "run", "run.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["doctr"], "Did you mean 'doctor'"),
        (["list", "--fix"], "Unknown argument '--fix'"),
        (["doctor", "--fxi"], "Did you mean '--fix'"),
        (["doctor", "out_root=x"], "Did you mean 'output_root='"),
        (["list", "output_root=absent"], "no folder absent"),
        (["doctor", "output_root=.", "nothing"], "Unknown open run"),
    ],
)
def test_mistakes_name_the_choices(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["runs", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
