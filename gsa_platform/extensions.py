"""What plugins may add beside components: data, evaluation tasks, callbacks, report sections,
benchmarks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from gsa_platform.components import Component
from gsa_platform.errors import UserError

EXTENSIONS = ("data", "eval_task", "callback", "report_section", "benchmark")


@dataclass
class NoSettings:
    """Of an extension that has none."""


@dataclass
class CallbackSettings:
    """Base of every callback's settings: ``callbacks.NAME.enabled=true`` turns it on."""

    enabled: bool = False


@dataclass
class BenchmarkSettings:
    """Base of every benchmark's settings, typed as options: ``bench NAME --out FILE``.

    A field is text, a number, a truth value or a list of texts or numbers; `choices` in its
    metadata limits the values.
    """

    out: str = ""  # JSON file to write; default bench-NAME.json
    commit: str = ""  # to record, where the sources are no git checkout


@dataclass(frozen=True)
class Extension(Component):
    """One named addition of a kind in EXTENSIONS. ``target`` is ``"package.module:name"``:

    data             ``Class(cfg)``, a gsa_platform.data.datamodule.TextDataModule; ``config`` is a
                     subclass of gsa_platform.config.DataConfig whose ``name`` is the name
    eval_task        ``Class()``, a gsa_platform.eval.task.EvalTask
    callback         ``Class(settings, cfg)``, a Lightning Callback; ``config`` is a subclass of
                     CallbackSettings
    report_section   ``function(run)``, rows of text; run: gsa_platform.report.section.FinishedRun
    benchmark        ``Class(settings)``, a gsa_platform.bench.Benchmark; ``config`` is a subclass
                     of BenchmarkSettings
    """

    config: type = NoSettings


def check_extension(kind: str, item: Any) -> None:
    """Raise UserError if what a registration hook returned is no proper record."""
    where = f"gsa_register_{kind}"
    if not isinstance(item, Extension):
        raise UserError(f"{where} must return Extension records, not {type(item).__name__}")
    if not re.fullmatch(r"[a-z]\w*", item.name):
        raise UserError(f"{where}: '{item.name}' must be lower-case letters, digits and _")
    if not re.fullmatch(r"[\w.]+:\w+", item.target):
        raise UserError(f"{where}: target '{item.target}' must look like 'package.module:name'")
    if kind == "data":
        from gsa_platform.config import DataConfig

        base: type = DataConfig
    elif kind == "callback":
        base = CallbackSettings
    elif kind == "benchmark":
        base = BenchmarkSettings
    else:
        return
    if not (isinstance(item.config, type) and issubclass(item.config, base)):
        raise UserError(f"{where}: config of '{item.name}' must be a subclass of {base.__name__}")
    if kind == "data" and getattr(item.config, "name", None) != item.name:
        raise UserError(
            f'{where}: {item.config.__name__} needs a field  name: str = "{item.name}"'
        )
