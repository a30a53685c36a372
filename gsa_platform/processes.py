"""Worker processes as their parent sees them: the command, signals, output, and why they ended."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from omegaconf import DictConfig, OmegaConf

from gsa_platform.errors import UserError
from gsa_platform.run_folder import CONFIG_FILE, read_json
from gsa_platform.terminal import say
from gsa_platform.worker import ERROR_FILE, EXIT_CODES, LOG_FILE, RESULT_FILE, TARGET, Terminated

# What an outer torchrun leaves in the environment would make a worker join the wrong group.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE")


class WorkerError(RuntimeError):
    """A worker failed; the message is one block: the root cause and where the full log is."""


def train_in_workers(cfg: DictConfig, target: str, plain: bool) -> dict[str, Any]:
    """Train the config of a run folder in other processes and return the result.

    Raises UserError, KeyboardInterrupt, Terminated or WorkerError, as the workers ended.
    """
    folder = Path(cfg.run_dir)
    command = worker_command(cfg, target, plain)
    code, received = _run_process(command, folder / LOG_FILE, _worker_environment(cfg))
    outcome, failure = folder / RESULT_FILE, folder / ERROR_FILE
    if code == 0 and outcome.exists():
        return read_json(outcome)
    error = read_json(failure) if failure.exists() else {}
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
    raise WorkerError(_root_cause(error, code, folder / LOG_FILE))


def try_in_process(cfg: DictConfig) -> None:
    """Try what a training may refuse, in another process; raises its UserError."""
    done = subprocess.run(
        [sys.executable, "-m", "gsa_platform.preflight"],
        input=OmegaConf.to_yaml(cfg, resolve=True),
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    if done.returncode == EXIT_CODES["user"]:
        raise UserError(done.stdout.strip())


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
        say(f"on each of the {nodes - 1} other nodes run: {shlex.join(command)}")
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


def terminate_on_sigterm() -> contextlib.AbstractContextManager[None]:
    def handler(signum: int, frame: FrameType | None) -> None:
        raise Terminated

    return _handlers(handler, signal.SIGTERM)


def signals_ignored() -> contextlib.AbstractContextManager[None]:
    # While a run is being closed; a second Ctrl-C would leave it RUNNING.
    return _handlers(signal.SIG_IGN)
