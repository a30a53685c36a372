"""Launching: run folders, run status and exit codes of real processes, resume, sweeps."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf

from gsa_platform.errors import UserError
from gsa_platform.launch import launch, resolve_devices
from gsa_platform.processes import WorkerError
from gsa_platform.sweep import SweepContext, finish_sweep, new_sweep_folder
from gsa_platform.tracking import open_database

STUBS = """
import os, sys, time
from pathlib import Path

from gsa_platform.errors import UserError


def ok(cfg):
    from gsa_platform.tracking import build_loggers

    for logger in build_loggers(cfg):
        logger.log_metrics({"loss": 0.5}, int(cfg.train.steps))
        logger.finalize("success")
    folder = Path(cfg.run_dir) / "checkpoints"
    folder.mkdir(exist_ok=True)
    (folder / "last.ckpt").write_text("weights")
    return {"loss": 0.5, "resume": cfg.train.resume, "hydra": "hydra" in sys.modules}


def plain(cfg):
    return {"torch": "torch" in sys.modules}


def boom(cfg):
    raise RuntimeError("the roof is on fire")


def user(cfg):
    raise UserError("context=4096 is longer than the data; choose context <= 1024")


def wait(cfg):
    (Path(cfg.run_dir) / "started").touch()
    for _ in range(6000):  # far longer than a test takes, which may come late to it
        time.sleep(0.05)
    return {}


def reduce_all(cfg):
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    value = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(value)
    result = ok(cfg) | {"sum": value.item(), "world": dist.get_world_size()}
    print("progress of rank", dist.get_rank(), flush=True)
    dist.destroy_process_group()
    return result


def boom_on_one(cfg):
    if os.environ["RANK"] == "1":
        boom(cfg)
    wait(cfg)


def die_on_one(cfg):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), 9)
    wait(cfg)


def lightning(cfg):
    import torch
    from lightning.pytorch import Callback, LightningModule, Trainer

    class Model(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch, index):
            time.sleep(0.05)
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    class Started(Callback):
        def on_train_batch_end(self, trainer, *rest):
            (Path(cfg.run_dir) / "started").touch()

    trainer = Trainer(
        max_steps=6000, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Started()],
    )
    trainer.fit(Model(), torch.utils.data.DataLoader(torch.ones(6000, 1)))
    return {}
"""

DRIVER = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in a script's background ignore it
from omegaconf import OmegaConf
from gsa_platform.errors import UserError
from gsa_platform.launch import launch
from gsa_platform.processes import WorkerError

cfg = OmegaConf.load(sys.argv[1])
target, inline = "launch_stubs:" + sys.argv[2], json.loads(sys.argv[3])
try:
    print(json.dumps(launch(cfg, target=target, inline=inline)))
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
except KeyboardInterrupt:
    sys.exit(130)
except WorkerError as error:
    print(error, file=sys.stderr)
    sys.exit(1)
"""


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("db") / "mlflow.db"
    open_database(f"sqlite:///{path}")
    return path


def make_config(folder: Path, empty_database: Path) -> DictConfig:
    """A config whose output folder has a ready database; the stubs lie in <folder>/stubs."""
    (folder / "stubs").mkdir()
    (folder / "stubs" / "launch_stubs.py").write_text(STUBS)
    output = folder / "runs"
    output.mkdir()
    shutil.copy(empty_database, output / "mlflow.db")
    return OmegaConf.create(
        {
            "name": "job",
            "output_root": str(output),
            "run_dir": None,
            "train": {"steps": 3, "resume": None},
            "trainer": {"devices": 1, "num_nodes": 1, "accelerator": "cpu"},
            "tracking": {
                "name": "mlflow",
                "uri": None,
                "experiment": None,
                "run_name": None,
                "system_metrics": False,
                "run_id": None,
                "parent_run_id": None,
                "tags": {},
            },
        }
    )


@pytest.fixture
def cfg(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> DictConfig:
    """A config for launching in this process and in others."""
    config = make_config(tmp_path, empty_database)
    monkeypatch.syspath_prepend(str(tmp_path / "stubs"))
    for name, value in environment(config).items():
        monkeypatch.setenv(name, value)
    return config


def environment(cfg: DictConfig) -> dict[str, str]:
    stubs, repository = Path(cfg.output_root).parent / "stubs", Path(__file__).parents[2]
    return {"PYTHONPATH": f"{stubs}:{repository}", "OMP_NUM_THREADS": "1"}


def runs(cfg: DictConfig) -> list[Any]:
    client = open_database(f"sqlite:///{cfg.output_root}/mlflow.db").client()
    found = client.get_experiment_by_name(cfg.name)
    return list(client.search_runs([found.experiment_id])) if found else []


def folders(cfg: DictConfig) -> list[Path]:
    return sorted((Path(cfg.output_root) / cfg.name).glob("*"))


def start(cfg: DictConfig, stub: str, inline: bool | None = None) -> subprocess.Popen[str]:
    path = Path(cfg.output_root).parent / "job.yaml"
    path.write_text(OmegaConf.to_yaml(cfg))
    command = [sys.executable, "-c", DRIVER, str(path), stub, json.dumps(inline)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=path.parent,
        env=os.environ | environment(cfg),
    )


def signal_when_started(cfg: DictConfig, process: subprocess.Popen[str], number: int) -> str:
    """Send the signal once the stub trains; returns stderr after the process has ended."""
    limit = time.time() + 180
    while not list(Path(cfg.output_root).glob("job/*/started")):
        assert process.poll() is None and time.time() < limit, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    return process.communicate(timeout=180)[1]


def test_inline_run_leaves_a_readable_folder_and_a_finished_run(cfg: DictConfig) -> None:
    result = launch(cfg, target="launch_stubs:ok")
    (folder,) = folders(cfg)
    assert result["status"] == "FINISHED" and result["run_dir"] == str(folder)
    names = {"config.yaml", "command.txt", "run.json", "result.json", "metrics.jsonl"}
    assert names <= {path.name for path in folder.iterdir()}
    (run,) = runs(cfg)
    assert run.info.status == "FINISHED" and run.data.metrics == {"loss": 0.5}
    written = OmegaConf.load(folder / "config.yaml")
    assert written.tracking.run_id == run.info.run_id == result["run_id"]
    assert json.loads((folder / "result.json").read_text())["loss"] == 0.5


def test_parent_loads_no_torch(cfg: DictConfig) -> None:
    output, errors = start(cfg, "plain").communicate(timeout=180)
    assert json.loads(output)["torch"] is False, errors


def test_tracking_none_needs_no_database(cfg: DictConfig) -> None:
    cfg.tracking.name = "none"
    result = launch(cfg, target="launch_stubs:ok")
    assert result["run_id"] is None and runs(cfg) == []
    assert json.loads((folders(cfg)[0] / "metrics.jsonl").read_text())["step"] == 3


# stub, devices, inline, signal, exit code
KILLED = [
    ("wait", 1, True, signal.SIGTERM, 143),
    ("wait", 1, True, signal.SIGINT, 130),
    ("lightning", 1, True, signal.SIGTERM, 143),
    ("lightning", 1, False, signal.SIGINT, 130),
    ("wait", 2, False, signal.SIGTERM, 143),
]


@pytest.fixture(scope="module")
def started(
    tmp_path_factory: pytest.TempPathFactory, empty_database: Path
) -> Iterator[list[tuple[DictConfig, subprocess.Popen[str]]]]:
    """One process per row of KILLED, started together because they mostly import."""
    found = []
    for stub, devices, inline, _, _ in KILLED:
        config = make_config(tmp_path_factory.mktemp("killed"), empty_database)
        config.trainer.devices = devices
        found.append((config, start(config, stub, inline)))
    yield found
    for _, process in found:
        process.kill()
        process.wait()


@pytest.mark.parametrize("row", range(len(KILLED)))
def test_signals_end_as_killed(
    started: list[tuple[DictConfig, subprocess.Popen[str]]], row: int
) -> None:
    config, process = started[row]
    errors = signal_when_started(config, process, KILLED[row][3])
    assert process.returncode == KILLED[row][4], errors
    assert [run.info.status for run in runs(config)] == ["KILLED"]
    assert not (folders(config)[0] / "result.json").exists()


def test_exception_inline_is_raised_as_it_is(cfg: DictConfig) -> None:
    with pytest.raises(RuntimeError, match="roof"):
        launch(cfg, target="launch_stubs:boom")
    assert [run.info.status for run in runs(cfg)] == ["FAILED"]
    assert json.loads((folders(cfg)[0] / "error.json").read_text())["kind"] == "failure"


@pytest.mark.parametrize("inline", [True, False])
def test_user_error_before_training_leaves_nothing(cfg: DictConfig, inline: bool) -> None:
    process = start(cfg, "user", inline)
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 2
    assert "Traceback" not in output + errors
    assert "context=4096 is longer than the data" in errors
    assert runs(cfg) == []
    left = {path.name for folder in folders(cfg) for path in folder.iterdir()}
    assert left <= {"worker.log"}


def test_two_ranks_share_one_folder_and_one_run(
    cfg: DictConfig, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    cfg.trainer.devices = 2
    result = launch(cfg, target="launch_stubs:reduce_all")
    assert result["sum"] == 3.0 and result["world"] == 2
    assert result["hydra"] is False
    (folder,) = folders(cfg)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    (run,) = runs(cfg)
    assert run.info.status == "FINISHED" and run.info.run_id == result["run_id"]
    assert b"progress of rank 0" in (folder / "worker.log").read_bytes()


def test_two_ranks_report_the_root_cause_once(cfg: DictConfig) -> None:
    cfg.trainer.devices = 2
    process = start(cfg, "boom_on_one")
    output, errors = process.communicate(timeout=90)
    assert process.returncode == 1
    assert errors.count("Traceback") == 1 and "rank 1" in errors
    assert "RuntimeError: the roof is on fire" in errors and "Traceback" not in output
    assert [run.info.status for run in runs(cfg)] == ["FAILED"]


def test_a_rank_that_dies_silently_is_named(cfg: DictConfig) -> None:
    cfg.trainer.devices, cfg.tracking.name = 2, "none"
    with pytest.raises(WorkerError, match=r"rank      : 1(.|\n)*SIGKILL"):
        launch(cfg, target="launch_stubs:die_on_one")
    # Not "killed", which is only what torchrun then did to the other rank.
    assert json.loads((folders(cfg)[0] / "error.json").read_text())["kind"] == "failure"


def test_resume_goes_on_in_the_same_run_and_folder(cfg: DictConfig) -> None:
    first = launch(cfg, target="launch_stubs:ok")
    cfg.train.resume, cfg.train.steps = "auto", 9
    second = launch(cfg, target="launch_stubs:ok")
    assert second["run_id"] == first["run_id"] and second["run_dir"] == first["run_dir"]
    assert second["resume"] == f"{first['run_dir']}/checkpoints/last.ckpt"
    (run,) = runs(cfg)
    assert json.loads(run.data.tags["param_drift"]) == {"train.steps": ["3", "9"]}
    assert run.info.status == "FINISHED"
    lines = (Path(first["run_dir"]) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 9]
    assert OmegaConf.load(Path(first["run_dir"]) / "config.1.yaml").train.steps == 3


def test_user_error_of_a_resumed_run_deletes_nothing(cfg: DictConfig) -> None:
    first = launch(cfg, target="launch_stubs:ok")
    cfg.train.resume = first["run_dir"]
    with pytest.raises(UserError, match="context=4096"):
        launch(cfg, target="launch_stubs:user")
    assert (Path(first["run_dir"]) / "checkpoints" / "last.ckpt").exists()
    # Refused before the first step: the finished run stays finished.
    assert [run.info.status for run in runs(cfg)] == ["FINISHED"]


def test_resume_of_nothing(cfg: DictConfig) -> None:
    cfg.train.resume = "missing.ckpt"
    with pytest.raises(UserError, match=r"missing\.ckpt.*auto"):
        launch(cfg, target="launch_stubs:ok")
    assert folders(cfg) == []
    cfg.train.resume = "auto"
    assert launch(cfg, target="launch_stubs:ok")["resume"] is None


def test_a_run_in_use_is_not_resumed(cfg: DictConfig) -> None:
    first = launch(cfg, target="launch_stubs:ok")
    with FileLock(f"{first['run_dir']}/.lock"):
        cfg.train.resume = first["run_dir"]
        with pytest.raises(UserError, match="in use"):
            launch(cfg, target="launch_stubs:ok")
        cfg.train.resume = "auto"
        assert launch(cfg, target="launch_stubs:ok")["run_dir"] != first["run_dir"]


def test_sweep_jobs_are_children_with_folders_of_their_own(cfg: DictConfig) -> None:
    folder = new_sweep_folder(cfg)
    jobs = []
    for i in range(2):
        context = SweepContext(folder, i, (f"train.steps={i}",))
        jobs.append(launch(cfg, context, target="launch_stubs:plain", inline=True))
    with pytest.raises(WorkerError, match="roof"):
        launch(cfg, SweepContext(folder, 2), target="launch_stubs:boom")
    finish_sweep(folder, "FAILED")
    assert [job["run_dir"] for job in jobs] == [f"{folder}/000", f"{folder}/001"]
    assert "train.steps=1" in (folder / "001" / "command.txt").read_text()
    by_parent: dict[str | None, list[str]] = {}
    for run in runs(cfg):
        parent = run.data.tags.get("mlflow.parentRunId")
        by_parent.setdefault(parent, []).append(run.info.status)
        if parent is None:
            sweep_id = run.info.run_id
    assert by_parent == {None: ["FAILED"], sweep_id: ["FAILED", "FINISHED", "FINISHED"]}


@pytest.mark.parametrize("asked", [0, "many", [0, 1]])
def test_impossible_devices_name_the_choices(cfg: DictConfig, asked: Any) -> None:
    cfg.trainer.devices = asked
    with pytest.raises(UserError, match="positive number, -1 or auto"):
        resolve_devices(cfg)
    cfg.trainer.devices = "auto"
    assert resolve_devices(cfg) == 1


@pytest.mark.parametrize(
    ("gpus", "accelerator", "devices", "message"),
    [
        (0, "cuda", 1, "no GPU here"),
        (0, "cuda", "auto", "no GPU here"),
        (2, "auto", 3, "this machine has 2, so 1 to 2"),
        (2, "cuda", 3, "this machine has 2, so 1 to 2"),
        (2, "cpu", 3, None),
        (0, "auto", 2, None),
        (2, "auto", 2, None),
    ],
)
def test_gpus_that_are_not_there_are_refused_before_a_run(
    cfg: DictConfig, monkeypatch: Any, gpus: int, accelerator: str, devices: Any, message: Any
) -> None:
    from gsa_platform import hardware

    machine = hardware.Hardware("cuda" if gpus else "cpu", "stub", max(1, gpus), 80.0, 2, 24.0)
    monkeypatch.setattr(hardware, "detect", lambda: machine)
    cfg.trainer.accelerator, cfg.trainer.devices = accelerator, devices
    if message is None:
        assert resolve_devices(cfg) == devices
    else:
        with pytest.raises(UserError, match=message):
            resolve_devices(cfg)
