"""The parent of a training: run folder, MLflow run, workers, and the truth about how it ended.

Imports no torch unless it trains inline, which it does for one device outside a sweep.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from gsa_platform.atomic import write_json, write_text, write_yaml
from gsa_platform.errors import UserError
from gsa_platform.tracking.database import SQLITE, Database, normalise_uri, open_database
from gsa_platform.tracking.run import (
    create_run,
    create_sweep_run,
    discard_run,
    finish_run,
    resume_run,
)
from gsa_platform.worker import (
    ERROR_FILE,
    LOG_FILE,
    RESULT_FILE,
    TARGET,
    Terminated,
    execute,
    save_error,
)

log = logging.getLogger(__name__)

CONFIG_FILE, RUN_FILE, SWEEP_FILE, LOCK_FILE = "config.yaml", "run.json", "sweep.json", ".lock"
LAST_CHECKPOINT = "last*.ckpt"
# What an outer torchrun leaves in the environment would make a worker join the wrong group.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE")


class WorkerError(RuntimeError):
    """A worker failed; the message is one block: the root cause and where the full log is."""


@dataclass(frozen=True)
class SweepContext:
    """Place of one job in a sweep: the sweep's folder, the job's number and its overrides."""

    folder: Path
    job: int
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to go on from, and the run folder and run.json it belongs to, if any."""

    path: Path
    run_dir: Path | None
    record: dict[str, Any]


def launch(
    cfg: DictConfig,
    sweep: SweepContext | None = None,
    *,
    target: str = TARGET,
    inline: bool | None = None,
) -> dict[str, Any]:
    """Train one validated config and return the result: what the training function returned
    plus status, run_dir, run_id (None without MLflow) and tracking_uri.

    `inline` None trains in this process if there is one device and no sweep. Every run is closed:
    FINISHED, KILLED (Ctrl-C, SIGTERM) or FAILED. Raises UserError (a new run that logged nothing
    is then removed), KeyboardInterrupt, Terminated (SystemExit 143), WorkerError, or, inline,
    whatever the training raised.
    """
    cfg = _own_copy(cfg)
    devices = resolve_devices(cfg)
    cfg.trainer.devices = devices
    if inline is None:
        inline = devices == 1 and sweep is None and int(cfg.trainer.get("num_nodes", 1)) == 1
    resumed = find_checkpoint(cfg, sweep)
    cfg.train.resume = str(resumed.path) if resumed is not None else None
    with _terminate_on_sigterm():
        run = _open_run(cfg, sweep, resumed)
        try:
            _say(f"run     {run.folder}")
            if inline:
                result = _train_inline(run, target)
            else:
                result = _train_in_workers(run, target, plain=devices == 1)
        except BaseException as error:
            with _signals_ignored():
                run.close_after(error)
            raise
        with _signals_ignored():
            run.close("FINISHED")
    result = {
        **result,
        "status": "FINISHED",
        "run_dir": str(run.folder),
        "run_id": run.run_id,
        "tracking_uri": cfg.tracking.uri if run.run_id else None,
    }
    if run.run_id and sweep is None:
        _say(f"compare mlflow ui --backend-store-uri {shlex.quote(cfg.tracking.uri)}")
    return result


def resolve_devices(cfg: DictConfig) -> int:
    """Number of worker processes per node; "auto" and -1 are all GPUs, or one CPU process."""
    asked = cfg.trainer.devices
    if asked in ("auto", -1, "-1"):
        if cfg.trainer.get("accelerator", "auto") == "cpu":
            return 1
        from gsa_platform.hardware import detect

        found = detect()
        return max(1, found.count) if found.kind == "cuda" else 1
    try:
        count = int(asked)
    except (TypeError, ValueError):
        count = 0
    if count < 1:
        raise UserError(f"trainer.devices={asked}: choose a positive number, -1 or auto")
    return count


def find_checkpoint(cfg: DictConfig, sweep: SweepContext | None = None) -> Checkpoint | None:
    """The checkpoint that `train.resume` names, or None to start anew.

    A path is a checkpoint or a run folder. "auto" is the newest last checkpoint of the runs of
    this name that no other process is using; if there is none, the training starts anew.
    Jobs of a sweep may start from a path, each in a run of its own; "auto" is nothing to them.
    """
    asked = cfg.train.get("resume")
    if asked in (None, "", False) or (sweep is not None and asked == "auto"):
        return None
    if asked != "auto":
        path = Path(str(asked)).expanduser().absolute()
        found = path
        if not path.exists():
            raise UserError(
                f"train.resume={asked}: no such file; give a checkpoint, a run folder or auto"
            )
        # A sharded checkpoint is a folder too.
        if path.is_dir() and (path / RUN_FILE).exists():
            last = _last_checkpoint(path)
            if last is None:
                raise UserError(f"train.resume={asked}: the run has no {LAST_CHECKPOINT}")
            found = last
        if sweep is not None:
            return Checkpoint(found, None, {})
        owner = next((p for p in [path, *path.parents] if (p / RUN_FILE).is_file()), None)
        return Checkpoint(found, owner, _read_json(owner / RUN_FILE) if owner else {})
    candidates = []
    for record in (Path(cfg.output_root) / str(cfg.name)).glob(f"*/{RUN_FILE}"):
        last = _last_checkpoint(record.parent)
        if last is not None and not _in_use(record.parent):
            candidates.append((last.stat().st_mtime, last, record))
    if not candidates:
        _say(f"train.resume=auto: no checkpoint of {cfg.name} to go on from, starting anew")
        return None
    _, path, record = max(candidates)
    return Checkpoint(path, record.parent, _read_json(record))


def new_sweep_folder(cfg: DictConfig) -> Path:
    """A new folder <output_root>/<name>/sweep-<time>-<id> for the jobs of one sweep."""
    return _new_folder(Path(cfg.output_root).absolute() / str(cfg.name), "sweep-")


def sweep_run(cfg: DictConfig, folder: Path) -> str | None:
    """Id of the MLflow run over a sweep's jobs, created by whichever job comes first."""
    if cfg.tracking.name != "mlflow":
        return None
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder / f"{SWEEP_FILE}.lock")):
        if (folder / SWEEP_FILE).exists():
            return str(_read_json(folder / SWEEP_FILE)["run_id"])
        cfg = _own_copy(cfg)
        run_id = create_sweep_run(cfg, folder.name)
        write_json(folder / SWEEP_FILE, {"run_id": run_id, "tracking_uri": cfg.tracking.uri})
        return run_id


def finish_sweep(folder: Path, status: str) -> None:
    """Close the run over a sweep's jobs with FINISHED, FAILED or KILLED, if there is one."""
    if (folder / SWEEP_FILE).exists():
        record = _read_json(folder / SWEEP_FILE)
        finish_run(record["run_id"], status, record["tracking_uri"])


@dataclass
class _Run:
    cfg: DictConfig
    folder: Path
    run_id: str | None
    resumed: bool
    lock: FileLock
    earlier_status: str = "FAILED"  # of a resumed run, before this attempt

    def close_after(self, error: BaseException) -> None:
        """Close the run the way `error` ended it; remove it if it never got to train."""
        save_error(self.folder, error)
        if isinstance(error, UserError) and not self.resumed and self._untrained():
            self._discard()
        elif isinstance(error, UserError) and self.resumed:
            # Refused before the first step: the run is what it was.
            self.close(self.earlier_status)
        elif isinstance(error, KeyboardInterrupt | Terminated):
            self.close("KILLED")
        else:
            self.close("FAILED")

    def close(self, status: str) -> None:
        self.lock.release()
        if self.run_id is None:
            return
        try:
            finish_run(self.run_id, status, self.cfg.tracking.uri)
        except Exception as error:
            # The training's own outcome matters more than a store that went away.
            log.warning("could not set run %s to %s: %s", self.run_id, status, error)

    def _untrained(self) -> bool:
        metrics = self.folder / "metrics.jsonl"
        logged = metrics.exists() and metrics.stat().st_size > 0
        return not logged and not any(self.folder.rglob("*.ckpt"))

    def _discard(self) -> None:
        if self.run_id is not None and not discard_run(self.run_id, self.cfg.tracking.uri):
            self.close("FAILED")
            return
        self.lock.release()
        for path in self.folder.iterdir():
            if path.name == LOG_FILE and path.stat().st_size > 0:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        # rmdir refuses folders that hold a log or other runs, which is what is wanted.
        with contextlib.suppress(OSError):
            self.folder.rmdir()
            self.folder.parent.rmdir()


def _open_run(cfg: DictConfig, sweep: SweepContext | None, resumed: Checkpoint | None) -> _Run:
    # First whatever can fail for reasons of the user's, then the folder, then the run.
    database = open_database(cfg.tracking.uri) if cfg.tracking.name == "mlflow" else None
    if sweep is not None:
        cfg.tracking.parent_run_id = sweep_run(cfg, Path(sweep.folder))
        folder = _job_folder(Path(sweep.folder).absolute(), sweep.job)
    elif resumed is not None and resumed.run_dir is not None:
        folder = resumed.run_dir
    else:
        folder = _new_folder(Path(cfg.output_root) / str(cfg.name))
    lock = FileLock(str(folder / LOCK_FILE))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder} is in use by another process; wait or stop it") from None
    cfg.run_dir = str(folder)
    continued = resumed is not None and resumed.run_dir is not None
    run = _Run(cfg, folder, None, continued, lock)
    try:
        if continued:
            _set_aside_previous(folder)
        if database is not None:
            old = resumed.record.get("run_id") if resumed is not None else None
            run.run_id, status = _open_mlflow_run(cfg, folder, database, old)
            if status in ("FINISHED", "KILLED"):
                run.earlier_status = status
        cfg.tracking.run_id = run.run_id
        _write_run_files(run, sweep)
    except BaseException as error:
        with _signals_ignored():
            run.close_after(error)
        raise
    return run


def _open_mlflow_run(
    cfg: DictConfig, folder: Path, database: Database, old: str | None
) -> tuple[str, str]:
    """(run id, the status it had): the old run if there is one to go on with, else a new one."""
    if old:
        try:
            return old, resume_run(old, cfg)
        except KeyError as error:
            _say(f"going on in a new MLflow run: {error.args[0]}")
    return create_run(cfg, folder, database), "RUNNING"


def _write_run_files(run: _Run, sweep: SweepContext | None) -> None:
    cfg, folder = run.cfg, run.folder
    command = folder / "command.txt"
    lines = command.read_text(encoding="utf-8") if command.exists() else ""
    if sweep is not None and sweep.overrides:
        lines += f"# sweep job {sweep.job}: {shlex.join(sweep.overrides)}\n"
    write_text(command, f"{lines}{shlex.join(sys.argv)}\n")
    record = {
        "run_id": run.run_id,
        "tracking_uri": cfg.tracking.uri if run.run_id else None,
        "name": str(cfg.name),
        "parent_run_id": cfg.tracking.get("parent_run_id"),
    }
    write_json(folder / RUN_FILE, record)
    write_yaml(folder / CONFIG_FILE, cfg)


def _own_copy(cfg: DictConfig) -> DictConfig:
    # Plain and resolved, so that inline training sees exactly what a worker reads from YAML.
    copy = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    assert isinstance(copy, DictConfig)
    copy.output_root = str(Path(str(copy.output_root)).expanduser().absolute())
    if copy.tracking.name == "mlflow":
        default = f"{SQLITE}{copy.output_root}/mlflow.db"
        copy.tracking.uri = normalise_uri(str(copy.tracking.get("uri") or default))
    return copy


def _new_folder(parent: Path, prefix: str = "") -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = parent / f"{prefix}{stamp}-{secrets.token_hex(3)}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


def _job_folder(sweep: Path, job: int) -> Path:
    sweep.mkdir(parents=True, exist_ok=True)
    attempt = 0
    while True:
        folder = sweep / (f"{job:03d}" if attempt == 0 else f"{job:03d}-{attempt}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
        attempt += 1


def _set_aside_previous(folder: Path) -> None:
    for name in (RESULT_FILE, ERROR_FILE):
        (folder / name).unlink(missing_ok=True)
    if (folder / CONFIG_FILE).exists():
        number = len(list(folder.glob("config.*.yaml"))) + 1
        os.replace(folder / CONFIG_FILE, folder / f"config.{number}.yaml")


def _last_checkpoint(folder: Path) -> Path | None:
    found = [(path.stat().st_mtime, path) for path in folder.rglob(LAST_CHECKPOINT)]
    return max(found)[1] if found else None


def _in_use(folder: Path) -> bool:
    try:
        with FileLock(str(folder / LOCK_FILE), timeout=0):
            return False
    except Timeout:
        return True


def _read_json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(value, dict), path
    return value


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _train_inline(run: _Run, target: str) -> dict[str, Any]:
    result = execute(run.cfg, target)
    write_json(run.folder / RESULT_FILE, result)
    return result


def _train_in_workers(run: _Run, target: str, plain: bool) -> dict[str, Any]:
    command = worker_command(run.cfg, target, plain)
    code, received = _run_process(command, run.folder / LOG_FILE, _worker_environment(run.cfg))
    outcome, failure = run.folder / RESULT_FILE, run.folder / ERROR_FILE
    if code == 0 and outcome.exists():
        return _read_json(outcome)
    error = _read_json(failure) if failure.exists() else {}
    kind = error.get("kind")
    if signal.SIGTERM in received or (plain and code in (-signal.SIGTERM, 143)):
        raise Terminated
    if received or kind == "interrupt" or (plain and code == -signal.SIGINT):
        raise KeyboardInterrupt
    if kind == "user":
        raise UserError(error["message"])
    if kind == "killed":
        # By torchrun, after another rank died without a word: not the cause.
        failure.unlink()
    raise WorkerError(_root_cause(error, code, run.folder / LOG_FILE))


def worker_command(cfg: DictConfig, target: str = TARGET, plain: bool = False) -> list[str]:
    """The command that trains the config of a run folder; `plain` is one process, no torchrun.

    With several nodes it is the command to run on each of them; they must share the run folder.
    """
    module = ["-m", "gsa_platform.worker", str(Path(cfg.run_dir) / CONFIG_FILE)]
    module += [] if target == TARGET else ["--target", target]
    nodes = int(cfg.trainer.get("num_nodes", 1))
    if plain and nodes == 1:
        return [sys.executable, *module]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    if nodes == 1:
        torchrun.append("--standalone")
    else:
        host = os.environ.get("MASTER_ADDR", socket.gethostname())
        port = os.environ.get("MASTER_PORT", "29500")
        torchrun += [f"--nnodes={nodes}", "--rdzv-backend=c10d"]
        torchrun += [f"--rdzv-endpoint={host}:{port}", f"--rdzv-id={Path(cfg.run_dir).name}"]
    command = [*torchrun, f"--nproc-per-node={cfg.trainer.devices}", *module]
    if nodes > 1:
        _say(f"on each of the {nodes - 1} other nodes run: {shlex.join(command)}")
    return command


def _worker_environment(cfg: DictConfig) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    environment["PYTHONUNBUFFERED"] = "1"
    environment.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // cfg.trainer.devices)))
    return environment


def _root_cause(error: dict[str, Any], code: int, log_path: Path) -> str:
    where = f"full log: {log_path}"
    if error.get("kind") == "failure":
        trace = "\n".join(str(error["traceback"]).rstrip().splitlines()[-20:])
        return f"training failed on rank {error['rank']}\n{trace}\n{where}"
    # No rank could say anything: killed from outside, or it died before Python was up.
    text = log_path.read_text(encoding="utf-8", errors="replace") if log_path.exists() else ""
    _, found, after = text.rpartition("Root Cause (first observed failure):")
    lines = (after if found else text).strip().splitlines()
    tail = "\n".join(lines[:12] if found else lines[-12:])
    return f"training failed, exit code {code}\n{tail}\n{where}"


def _run_process(
    command: Sequence[str], log_path: Path, environment: dict[str, str]
) -> tuple[int, list[int]]:
    """Run the workers to their end; returns the exit code and the signals passed on to them.

    Their stdout goes to the terminal (through a pseudo-terminal if there is one, so progress
    bars stay alive) and to the log, their stderr to the log.
    """
    received: list[int] = []
    process: subprocess.Popen[bytes] | None = None
    sent = 0

    def pass_on() -> None:
        nonlocal sent
        while process is not None and sent < len(received):
            sent += 1
            if sent <= 2:
                process.send_signal(received[sent - 1])
            else:
                # The session of the workers; whoever asks three times means it.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def handler(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        pass_on()

    with open(log_path, "ab", buffering=0) as log_file, _handlers(handler):
        reader, writer = _open_terminal()
        # A session of their own, or Ctrl-C would reach the workers twice.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=log_file,
            env=environment,
            start_new_session=True,
        )
        os.close(writer)
        pump = threading.Thread(target=_pump, args=(reader, log_file), daemon=True)
        pump.start()
        pass_on()
        try:
            code = process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        # Stray grandchildren may hold the pipe open; the workers themselves are gone.
        pump.join(timeout=5)
    return code, received


def _open_terminal() -> tuple[int, int]:
    if not sys.stdout.isatty():
        return os.pipe()
    import fcntl
    import pty
    import struct
    import termios

    reader, writer = pty.openpty()
    size = os.get_terminal_size(sys.stdout.fileno())
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", size.lines, size.columns, 0, 0))
    attributes = termios.tcgetattr(writer)
    attributes[1] &= ~termios.OPOST  # the real terminal turns \n into \r\n, once is enough
    termios.tcsetattr(writer, termios.TCSANOW, attributes)
    return reader, writer


def _pump(reader: int, log_file: BinaryIO) -> None:
    terminal = getattr(sys.stdout, "buffer", None)
    while True:
        try:
            chunk = os.read(reader, 65536)
        except OSError:  # how Linux reports the end of a pseudo-terminal
            chunk = b""
        if not chunk:
            break
        if not log_file.closed:
            log_file.write(chunk)
        if terminal is not None:
            try:
                terminal.write(chunk)
                terminal.flush()
            except (OSError, ValueError):
                terminal = None  # nobody reads any more; the log goes on
    os.close(reader)


@contextlib.contextmanager
def _handlers(handler: Any, *signals: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    chosen = signals or (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, handler) for number in chosen}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old if old is not None else signal.SIG_DFL)


def _terminate_on_sigterm() -> contextlib.AbstractContextManager[None]:
    def handler(signum: int, frame: FrameType | None) -> None:
        raise Terminated

    return _handlers(handler, signal.SIGTERM)


def _signals_ignored() -> contextlib.AbstractContextManager[None]:
    # While a run is being closed; a second Ctrl-C would leave it RUNNING.
    return _handlers(signal.SIG_IGN)
