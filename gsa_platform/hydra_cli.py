"""What Hydra does of the command line: sweeps, its own flags, and showing a configuration."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsa_platform.errors import UserError, unknown
from gsa_platform.terminal import exit_code, print_failure

if TYPE_CHECKING:
    from omegaconf import DictConfig


def show_config(arguments: list[str]) -> int:
    """Show what would run, with presets and slots resolved; other kinds are shown by Hydra."""
    from hydra._internal.utils import get_args_parser

    parsed = get_args_parser().parse_args(arguments)
    if parsed.cfg != "job" or parsed.multirun or parsed.config_dir:
        return with_hydra(arguments)
    from omegaconf import OmegaConf

    from gsa_platform import compose

    cfg: Any = compose.load(parsed.overrides)
    if parsed.package and parsed.package != "_global_":
        chosen = OmegaConf.select(cfg, parsed.package)
        if not OmegaConf.is_config(chosen):
            nodes = [str(key) for key in cfg if OmegaConf.is_config(cfg[key])]
            raise UserError(unknown("package", parsed.package, nodes))
        print(f"# @package {parsed.package}")
        cfg = chosen
    print(OmegaConf.to_yaml(cfg, resolve=parsed.resolve), end="")
    return 0


def with_hydra(arguments: list[str]) -> int:
    """Hand the command to Hydra: sweeps, ``--info``, shell completion and its other flags."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    from gsa_platform import compose

    overrides = [a for a in arguments if not a.startswith("-")]
    compose.prepare(overrides)
    jobs = _Jobs(sweep=bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments)))
    entry = hydra.main(
        config_path=f"pkg://{compose.CONF_MODULE}",
        config_name=compose.CONFIG_NAME,
        version_base="1.3",
    )(jobs.run)
    try:
        with _hydra_surroundings(arguments, jobs.sweep):
            entry()
    except compose.ERRORS as error:
        from gsa_platform.explain import explain

        GlobalHydra.instance().clear()
        with compose.hydra_context(_config_folders(arguments)):
            raise explain(error, [o for o in overrides if "=" in o], jobs.sweep) from error
    finally:
        jobs.close(sys.exc_info()[1])
        GlobalHydra.instance().clear()
    return jobs.finish()


def _config_folders(arguments: list[str]) -> list[str]:
    for flag, value in zip(arguments, [*arguments[1:], ""]):
        name, equals, joined = flag.partition("=")
        if name in ("--config-dir", "-cd"):
            folder = os.path.abspath(joined if equals else value)
            if not os.path.isdir(folder):
                raise UserError(f"{name}: there is no folder {folder}")
            return [folder]
    return []


class _Jobs:
    """Hydra's task function, and what became of each job."""

    def __init__(self, sweep: bool) -> None:
        self.sweep = sweep
        self.folder: Path | None = None
        self.count = 0
        self.failed: list[tuple[str, Exception]] = []

    def run(self, composed: DictConfig) -> Any:
        """Resolve, validate and train one job. A failed job of a sweep returns NaN."""
        from hydra.core.hydra_config import HydraConfig

        from gsa_platform import compose

        hydra_cfg = HydraConfig.get()
        overrides = list(hydra_cfg.overrides.task)
        self.count += 1
        try:
            cfg = compose.resolve(overrides)
            if self.sweep:
                print(f"job {hydra_cfg.job.num}   {' '.join(overrides)}", flush=True)
            validate_and_note(cfg)
            return self._launch(cfg, overrides, int(hydra_cfg.job.num) if self.sweep else 0)
        except Exception as error:
            if not self.sweep or composed.sweep.fail_fast:
                raise _Stop(error) from error  # Hydra would print its own report of an Exception
            self.failed.append((" ".join(overrides), error))
            print_failure(error)
            return float("nan")

    def _launch(self, cfg: DictConfig, overrides: list[str], number: int) -> Any:
        from gsa_platform import launch, sweep

        if not self.sweep:
            return launch.launch(cfg)
        if self.folder is None:
            self.folder = sweep.new_sweep_folder(cfg)
        context = sweep.SweepContext(self.folder, number, tuple(overrides))
        return launch.launch(cfg, context)

    def close(self, error: BaseException | None) -> None:
        """Give the sweep's own run its status."""
        if self.folder is None:
            return
        from gsa_platform.sweep import finish_sweep

        stopped = isinstance(error, KeyboardInterrupt) or (
            isinstance(error, SystemExit) and exit_code(error) in (130, 143)
        )
        bad = bool(self.failed) or error is not None
        finish_sweep(self.folder, "KILLED" if stopped else "FAILED" if bad else "FINISHED")

    def finish(self) -> int:
        """Print a sweep's summary and return the exit code."""
        if self.sweep and self.count:
            where = f" in {self.folder}" if self.folder and self.folder.exists() else ""
            print(f"sweep   {self.count - len(self.failed)} of {self.count} jobs finished{where}")
            for overrides, error in self.failed:
                print(f"failed  {overrides}: {str(error).strip().partition(chr(10))[0]}")
        return 1 if self.failed else 0


class _Stop(BaseException):
    """Carries an error out of Hydra, which catches every Exception of a job."""


@contextmanager
def _hydra_surroundings(arguments: list[str], sweep: bool) -> Iterator[None]:
    """Hydra reads sys.argv, reports errors itself unless told not to, and saves a sweep's
    settings in the sweep folder, which is a temporary one here."""
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    with tempfile.TemporaryDirectory(prefix="gsa-sweep-") as folder:
        extra = [f"hydra.sweep.dir='{folder}'"] if sweep else []
        if any(a.startswith("hydra.sweep.dir=") for a in arguments):
            extra = []
        # argparse takes settings only in one stretch: flags first, wherever they were typed.
        settings = [a for a in arguments if a[:1] == "~" or ("=" in a and a[:1] != "-")]
        flags = [a for a in arguments if a not in settings]
        sys.argv = [argv[0], *flags, *settings, *extra]
        os.environ["HYDRA_FULL_ERROR"] = "1"
        try:
            yield
        except _Stop as stop:
            assert stop.__cause__ is not None
            raise stop.__cause__ from None
        finally:
            sys.argv = argv
            if full is None:
                del os.environ["HYDRA_FULL_ERROR"]
            else:
                os.environ["HYDRA_FULL_ERROR"] = full


def validate_and_note(cfg: DictConfig) -> None:
    """Validate a composed configuration and tell what composing it decided."""
    from gsa_platform.validate import validate

    validate(cfg)
    for note in cfg.notes:
        print(f"note    {note}", flush=True)
