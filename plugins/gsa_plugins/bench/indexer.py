"""`bench indexer`: scoring, selection and objective of an indexer, without the attention."""

from collections.abc import Callable
from typing import Any

from gsa_kernels.bench.case import Case, Shape
from gsa_kernels.bench.indexer import hierarchical_records, indexer_record, objective_record
from gsa_platform.bench import Progress

from .layer import LayerBench, out_of_memory
from .settings import IndexerBenchSettings
from .tables import indexer_line, indexer_table


class IndexerBench(LayerBench):
    """For each shape a record of select, one of the objective, and those of coarse to fine."""

    settings: IndexerBenchSettings

    def __init__(self, settings: IndexerBenchSettings) -> None:
        super().__init__(settings)
        if min(settings.pool) < 0 or min(settings.survivors) < 1:
            raise ValueError("--survivors must be at least 1, and --pool (0 leaves it out)")

    def run(self, progress: Progress) -> dict[str, Any]:
        self.load(progress)
        report = self.begin(progress)
        report["skipped"] = []
        for shape in self.shapes():
            case = self.inputs(shape)
            for name, measure in self._parts():
                try:
                    rows = measure(shape, case)
                except Exception as error:
                    if not out_of_memory(error):
                        raise
                    why = f"{name} at {shape.seq_len}: the device's memory does not hold it"
                    report["skipped"].append(why)
                    progress.say(f"skipped {why}")
                    continue
                report["records"] += rows
                for row in rows:
                    progress.say(indexer_line(row))
                progress.save(report)
        return report

    def render(self, report: dict[str, Any]) -> str:
        return indexer_table(report)

    def _parts(self) -> list[tuple[str, Callable[[Shape, Case], list[dict[str, Any]]]]]:
        s = self.settings
        parts: list[tuple[str, Callable[[Shape, Case], list[dict[str, Any]]]]] = [
            ("select", lambda shape, case: [indexer_record(shape, case, s.seconds)])
        ]
        if s.dense_rows:
            parts.append(
                (
                    "objective",
                    lambda shape, case: [objective_record(shape, case, s.dense_rows, s.seconds)],
                )
            )
        if 0 in s.pool:
            return parts
        parts.append(
            (
                "hierarchical",
                lambda shape, case: hierarchical_records(
                    shape, case, s.pooling, s.pool, s.survivors, s.seconds / 2
                ),
            )
        )
        return parts
