"""The command line: train by default; the others are in COMMANDS."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gsa_platform import __version__
from gsa_platform.errors import UserError, unknown
from gsa_platform.hydra_cli import show_config, validate_and_note, with_hydra
from gsa_platform.terminal import exit_code, print_failure

if TYPE_CHECKING:
    from omegaconf import DictConfig

COMMANDS = ("train", "check", "eval", "bench", "plugins", "runs", "help")
PROGRAM = "gsa-platform"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 ok, 1 failure, 2 user error, 130 Ctrl-C,
    143 SIGTERM. GSA_FULL_ERROR=1 shows the traceback of user errors too."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except UserError as error:
        print_failure(error)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as error:
        return exit_code(error)
    except BrokenPipeError:  # the reader of our output, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        print_failure(error)
        return 1


def _dispatch(arguments: list[str]) -> int:
    if "--version" in arguments:
        print(f"{PROGRAM} {__version__}")
        return 0
    if {"--shell-completion", "-sc"} & set(arguments) and arguments[-1].endswith("=bash"):
        from gsa_platform import completion

        return completion.run(arguments)
    command = "train"
    if arguments and "=" not in arguments[0] and arguments[0][:1] not in "-+~":
        command = arguments.pop(0)
        if command not in COMMANDS:
            hint = "\n  Settings are typed as key=value, such as experiment=gsa_128k."
            raise UserError(unknown("command", command, COMMANDS) + hint)
    if command == "bench":
        from gsa_platform.bench.command import run as run_benchmark

        return run_benchmark(arguments)
    if command == "help" or {"--help", "-h"} & set(arguments):
        from gsa_platform.help import help_text

        print(help_text())
        return 0
    if command == "plugins":
        from gsa_platform.plugin_commands import run

        return run(arguments)
    if command == "runs":
        from gsa_platform.run_commands import run as run_command

        return run_command(arguments)
    if command == "eval":
        from gsa_platform import eval as evaluation

        evaluation.main(arguments)
        return 0
    if command == "check":
        _refuse_flags(arguments, command)
        from gsa_platform import check

        check.check(_validated(arguments))
        return 0
    return _train(arguments)


def _train(arguments: list[str]) -> int:
    if {"--cfg", "-c"} & set(arguments):
        return show_config(arguments)
    if any(a.startswith("-") or a.lstrip("+~").startswith("hydra") for a in arguments):
        return with_hydra(arguments)
    cfg = _validated(arguments)
    from gsa_platform.launch import launch

    launch(cfg)
    return 0


def _validated(overrides: list[str]) -> DictConfig:
    from gsa_platform import compose

    cfg = compose.load(overrides)
    validate_and_note(cfg)
    return cfg


def _refuse_flags(arguments: list[str], command: str) -> None:
    flags = [a for a in arguments if a.startswith("-")]
    if flags:
        raise UserError(f"'{PROGRAM} {command}' takes key=value settings, not {' '.join(flags)}.")
