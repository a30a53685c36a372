"""`bench indexer`: scoring, selection and objective of an indexer, without the attention."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gsa_kernels.bench.case import Case, Shape
from gsa_kernels.bench.indexer import hierarchical_records, indexer_record, objective_record
from gsa_platform.bench import Progress

from .layer import LayerBench, out_of_memory
from .settings import IndexerBenchSettings
from .tables import indexer_line, indexer_table

# (shape, its inputs, those whose choice is exact if not these) -> records
Measure = Callable[[Shape, Case, Case | None], list[dict[str, Any]]]


class IndexerBench(LayerBench):
    """For each shape a record of select, one of the objective, and those of coarse to fine; the
    recall of rounded index keys is that of the choice of unrounded ones. Raises ValueError for
    options that cannot go together."""

    settings: IndexerBenchSettings

    def __init__(self, settings: IndexerBenchSettings) -> None:
        super().__init__(settings)
        if min(settings.pool) < 0 or min(settings.survivors) < 1:
            raise ValueError("--survivors must be at least 1, and --pool (0 leaves it out)")
        if any(n < 1 for n in settings.survivor_keys) or settings.mass_rows < 1:
            raise ValueError("--survivor-keys and --mass-rows must be at least 1")
        for length, (_, r) in itertools.product(self.lengths, self.granularities):
            if settings.queries and not _whole(length, settings.queries, r):
                raise ValueError(
                    f"--queries {settings.queries}: the last so many of {length} must be whole "
                    f"query tiles of {r}"
                )

    def run(self, progress: Progress) -> dict[str, Any]:
        self.load(progress)
        report = self.begin(progress)
        report["skipped"] = []
        for shape in self.shapes():
            case = self.inputs(shape, self.settings.queries)
            rounded = shape.key_dtype != "auto"
            unrounded = replace(shape, key_dtype="auto")
            exact = self.inputs(unrounded, self.settings.queries) if rounded else None
            for name, measure in self._parts():
                try:
                    rows = measure(shape, case, exact)
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

    def _parts(self) -> list[tuple[str, Measure]]:
        s = self.settings
        parts: list[tuple[str, Measure]] = [
            (
                "select",
                lambda shape, case, exact: [
                    indexer_record(shape, case, s.seconds, exact, s.mass_rows)
                ],
            )
        ]
        if s.dense_rows:
            parts.append(
                (
                    "objective",
                    lambda shape, case, _: [
                        objective_record(shape, case, s.dense_rows, s.seconds)
                    ],
                )
            )
        if 0 in s.pool:
            return parts
        sizes = list(itertools.product(s.pool, s.survivors))
        if s.survivor_keys:
            sizes = [(p, max(1, n // p)) for p, n in itertools.product(s.pool, s.survivor_keys)]
        parts.append(
            (
                "hierarchical",
                lambda shape, case, exact: hierarchical_records(
                    shape, case, s.pooling, sizes, s.seconds / 2, exact, s.mass_rows
                ),
            )
        )
        return parts


def _whole(length: int, queries: int, tile: int) -> bool:
    return 0 <= queries <= length and (length - queries) % tile == 0
