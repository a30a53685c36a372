"""`bench attention`: the whole path of a layer's sparse attention beside dense attention."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from gsa_kernels.bench.attention import decode_record, layer_record
from gsa_kernels.bench.case import Case, Shape
from gsa_platform.bench import Progress
from gsa_platform.errors import UserError

from .beside import beside, dense_others
from .layer import LayerBench, out_of_memory
from .settings import AttentionBenchSettings
from .tables import attention_line, attention_table

TURNS = 16  # decoding queries that take turns


class AttentionBench(LayerBench):
    """One record for each combination of length, heads, granularity and pass."""

    settings: AttentionBenchSettings
    compiled_for = 0  # tokens

    def run(self, progress: Progress) -> dict[str, Any]:
        s = self.settings
        self.load(progress)
        report = self.begin(progress)
        report["skipped"] = []
        for shape, name in self._cases():
            try:
                report["records"].append(self._record(shape, name))
            except Exception as error:
                if not out_of_memory(error):
                    raise
                why = f"{_label(shape, name)}: the device's memory does not hold it"
                report["skipped"].append(why)
                progress.say(f"skipped {why}")
            else:
                progress.say(attention_line(report["records"][-1]))
            progress.save(report)
        if not report["records"]:
            raise UserError(f"nothing was timed: --passes {' '.join(s.passes)} leaves no case")
        return report

    def render(self, report: dict[str, Any]) -> str:
        return attention_table(report)

    def checks(self, shape: Shape, label: str) -> Iterator[tuple[str, Case, bool]]:
        yield from super().checks(shape, label)
        if "decode" in self.settings.passes:
            step = replace(shape, seq_len=self._cache(shape) + 1, batch=2)
            yield f"{label} decode", self.inputs(step, queries=1), False

    def _cases(self) -> Iterator[tuple[Shape, str]]:
        s = self.settings
        for shape in self.shapes():
            for name in s.passes:
                if name == "forward_backward" and shape.seq_len > s.longest_backward:
                    continue
                if name != "decode":
                    yield shape, name
                elif shape.batch == s.batch[0]:
                    for batch in s.decode_batch:
                        yield replace(shape, batch=batch), name

    def _record(self, shape: Shape, name: str) -> dict[str, Any]:
        s, others = self.settings, dense_others(shape)
        cuda = self.device.type == "cuda"
        if name == "decode":
            names = s.dense or (["cudnn", "flash", "efficient", "math"] if cuda else ["math"])
            case = self.inputs(
                replace(shape, seq_len=self._cache(shape) + 1),
                queries=min(TURNS, self._cache(shape)),
            )
            return decode_record(shape, case, names, self.rates, others, s.seconds)
        names = s.dense or (["cudnn", "flash", "fa3"] if cuda else ["flash"])
        case = self.inputs(shape)
        if s.beside and shape.seq_len != self.compiled_for:
            torch.compiler.reset()  # else the second length is compiled for any length
            self.compiled_for = shape.seq_len
        row = layer_record(shape, case, name, names, self.rates, others, s.seconds)
        if s.beside:
            backward = name == "forward_backward"
            with torch.no_grad():
                selection = case.choose()
            row["beside"] = beside(shape, case, selection, backward, s.beside)
        return row

    def _cache(self, shape: Shape) -> int:
        """Cached keys, about seq_len: the new token begins a tile, so that it chooses."""
        r = shape.spec.query_tile
        cache = shape.seq_len // r * r
        held = [layer["q_BTHE"].shape[1] for layer in self.captured.values()]
        if held and cache + 1 > held[0]:
            cache -= r
        if cache < 1:
            raise UserError(f"--passes decode needs a --seq-len of {r} at least")
        return cache


def _label(shape: Shape, name: str) -> str:
    return f"{name} of {shape.batch} x {shape.seq_len} tokens, {shape.kv_heads} kv heads"
