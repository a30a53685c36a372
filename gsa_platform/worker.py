"""A worker process: reads the resolved config of a run folder and trains. Knows no Hydra.

    python -m gsa_platform.worker <run_dir>/config.yaml [--target package.module:function]

Exit codes: 0 ok, 1 failure, 2 user error, 130 Ctrl-C, 143 SIGTERM. `result.json` (rank 0) and
`error.json` (the first rank that failed) in the run folder tell the parent what happened.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gsa_platform.atomic import write_json, write_text_once
from gsa_platform.errors import UserError

TARGET = "gsa_platform.train:train"
RESULT_FILE, ERROR_FILE, LOG_FILE = "result.json", "error.json", "worker.log"
EXIT_CODES = {"failure": 1, "user": 2, "interrupt": 130, "killed": 143}


class Terminated(SystemExit):
    """SIGTERM arrived; leaves the process with exit code 143 unless something catches it."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODES["killed"])


def execute(cfg: DictConfig, target: str = TARGET, *prepared: Any) -> dict[str, Any]:
    """Call the training function, with what is prepared for it, and return its result.

    Raises Terminated for SIGTERM and KeyboardInterrupt for Ctrl-C, whatever the training made of
    them, and every other exception as it is. Signal handlers are restored afterwards.
    """
    with _record_sigterm() as received:
        try:
            result = _resolve(target)(cfg, *prepared)
        except SystemExit as error:
            # Lightning ends with sys.exit(1) on Ctrl-C and with exit code 0 on SIGTERM.
            if received:
                raise Terminated from error
            if _caused_by_interrupt(error):
                raise KeyboardInterrupt from error
            raise RuntimeError(f"training ended early by sys.exit({error.code!r})") from error
        except Exception as error:
            # On SIGTERM the other ranks may be gone, and collectives then fail first.
            if received:
                raise Terminated from error
            raise
        if received or str(result.get("status")).upper() == "KILLED":
            raise Terminated
    return dict(result)


def describe_error(error: BaseException) -> dict[str, Any]:
    """The content of error.json: kind (a key of EXIT_CODES), type, message, traceback, rank."""
    kind = "failure"
    if isinstance(error, UserError):
        kind = "user"
    elif isinstance(error, KeyboardInterrupt):
        kind = "interrupt"
    elif isinstance(error, Terminated):
        kind = "killed"
    return {
        "kind": kind,
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
        "rank": int(os.environ.get("RANK", "0")),
    }


def save_error(run_dir: str | Path, error: BaseException) -> str:
    """Write error.json unless another rank was first; returns the kind of this error."""
    described = describe_error(error)
    # The first failure is the cause; the others mostly follow from it.
    write_text_once(Path(run_dir) / ERROR_FILE, json.dumps(described, indent=2) + "\n")
    return str(described["kind"])


def main(argv: list[str] | None = None) -> int:
    """Run one worker and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m gsa_platform.worker")
    parser.add_argument("config", type=Path, help="config.yaml in a run folder")
    parser.add_argument("--target", default=TARGET, help="package.module:function that trains")
    arguments = parser.parse_args(argv)
    run_dir: Path = arguments.config.absolute().parent
    try:
        cfg = OmegaConf.load(arguments.config)
        assert isinstance(cfg, DictConfig)
        result = _recorded(cfg, arguments.target)
    except (Exception, KeyboardInterrupt, Terminated) as error:
        kind = save_error(run_dir, error)
        if kind == "failure":
            # To the log only: the parent shows the cause once, not once per rank.
            with open(run_dir / LOG_FILE, "a", encoding="utf-8") as file:
                file.write(f"rank {os.environ.get('RANK', '0')}: {traceback.format_exc()}")
        return EXIT_CODES[kind]
    if os.environ.get("RANK", "0") == "0":
        write_json(run_dir / RESULT_FILE, result)
    return 0


def _recorded(cfg: DictConfig, target: str) -> dict[str, Any]:
    from torch.distributed.elastic.multiprocessing.errors import record

    # torchrun then names this rank's exception in its own report, which goes to the log.
    result = record(execute)(cfg, target)
    assert result is not None
    return result


def _resolve(target: str) -> Callable[..., dict[str, Any]]:
    module, colon, name = target.partition(":")
    if not colon:
        raise ValueError(f"target {target!r} is not of the form package.module:function")
    function: Callable[..., dict[str, Any]] = getattr(importlib.import_module(module), name)
    return function


@contextmanager
def _record_sigterm() -> Iterator[list[int]]:
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    owner = os.getpid()

    def handler(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            # Forked helpers (data loader workers) inherit the handler but own nothing to save.
            os._exit(EXIT_CODES["killed"])
        received.append(signum)
        # While Lightning trains it has put its handler in front of this one, and it stops after
        # the batch with a checkpoint. A second signal does not wait for that.
        if signal.getsignal(signal.SIGTERM) is handler or len(received) > 1:
            raise Terminated

    before_term = signal.signal(signal.SIGTERM, handler)
    before_int = signal.getsignal(signal.SIGINT)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before_term)
        # Lightning leaves Ctrl-C ignored after the first one.
        if before_int is not None:
            signal.signal(signal.SIGINT, before_int)


def _caused_by_interrupt(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


if __name__ == "__main__":
    # The launcher's own messages stay on stderr, which the parent keeps in the log; what
    # workers print, warnings included, is passed on to the terminal.
    os.dup2(1, 2)
    sys.exit(main())
