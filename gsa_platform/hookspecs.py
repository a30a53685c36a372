"""The hooks a plugin may implement. Hooks return values, so a plugin can be tested by a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from gsa_platform.components import Component
    from gsa_platform.extensions import Extension

PROJECT = "gsa_platform"
PLUGIN_API = (1, 2)

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Hooks:
    """Hook specifications. Implement any of them as a function marked with ``@hookimpl``."""

    @hookspec
    def gsa_register_attention(self) -> Component | list[Component]:  # type: ignore[empty-body]
        """Return attention backends: query, key, value (and a Selection) to output."""

    @hookspec
    def gsa_register_indexer(self) -> Component | list[Component]:  # type: ignore[empty-body]
        """Return indexers: modules that score which keys a query should see."""

    @hookspec
    def gsa_register_sparsity(self) -> Component | list[Component]:  # type: ignore[empty-body]
        """Return sparsity controllers: how many keys each query may attend."""

    @hookspec
    def gsa_register_gate(self) -> Component | list[Component]:  # type: ignore[empty-body]
        """Return gates on values and attention outputs."""

    @hookspec
    def gsa_register_objective(self) -> Component | list[Component]:  # type: ignore[empty-body]
        """Return training objectives of the indexer."""

    @hookspec
    def gsa_register_data(self) -> Extension | list[Extension]:  # type: ignore[empty-body]
        """Return data modules: what ``data=NAME`` trains and validates on."""

    @hookspec
    def gsa_register_eval_task(self) -> Extension | list[Extension]:  # type: ignore[empty-body]
        """Return evaluation tasks: what ``eval task=NAME`` measures of a checkpoint."""

    @hookspec
    def gsa_register_callback(self) -> Extension | list[Extension]:  # type: ignore[empty-body]
        """Return callbacks of the training, turned on by ``callbacks.NAME.enabled=true``."""

    @hookspec
    def gsa_register_report_section(self) -> Extension | list[Extension]:  # type: ignore[empty-body]
        """Return sections of the closing summary of a run."""

    @hookspec
    def gsa_register_benchmark(self) -> Extension | list[Extension]:  # type: ignore[empty-body]
        """Return benchmarks: what ``bench NAME`` checks and times."""

    @hookspec
    def gsa_validate(self, config: Any) -> None:
        """Raise ``gsa_platform.errors.UserError`` for a combination your components refuse."""
