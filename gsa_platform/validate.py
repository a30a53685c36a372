"""Checks a composed configuration before anything expensive starts. Every problem is reported at
once, each with its value, what is allowed and what to type. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gsa_platform import component_checks, registry, setting_checks
from gsa_platform.errors import UserError
from gsa_platform.setting_checks import Problems

CHECKS: tuple[Callable[[Any], Problems], ...] = (*setting_checks.CHECKS, *component_checks.CHECKS)


def validate(cfg: Any) -> None:
    """Raise one UserError that lists every problem of a resolved configuration."""
    problems = [problem for check in CHECKS for problem in check(cfg)]
    problems += _plugin_checks(cfg)
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(f"{len(problems)} problems in the configuration:\n{listed}")


def _plugin_checks(cfg: Any) -> list[str]:
    found = registry.get()
    problems = []
    for impl in found.manager.hook.gsa_validate.get_hookimpls():
        owner = next((p.name for p in found.plugins if p.module is impl.plugin), impl.plugin_name)
        try:
            impl.function(*[cfg] * len(impl.argnames))
        except UserError as error:
            problems.append(str(error))
        except Exception as error:
            raise UserError(
                f"The gsa_validate hook of plugin '{owner}' crashed: "
                f"{type(error).__name__}: {error}\n"
                f"  Report it to its author, or turn it off: GSA_DISABLE_PLUGINS={owner}."
            ) from error
    return problems
