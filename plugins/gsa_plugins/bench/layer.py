"""What the benchmarks of a layer share: options to shapes, inputs, the check before any time."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from gsa_kernels.bench.case import Case, Shape, make_case, shape_of_capture
from gsa_kernels.bench.timing import environment, rates
from gsa_kernels.bench.verify import wrong
from gsa_kernels.selection import SelectionSpec
from gsa_kernels.sparse_attention.api import choose
from gsa_platform.bench import Benchmark, Progress, WrongResultError
from gsa_platform.errors import UserError

from ..granularity import granularity
from .capture import captured
from .settings import LayerBenchSettings

# (on a GPU, on a CPU)
_DEFAULTS = {"heads": (16, 4), "kv_heads": (4, 2), "head_dim": (128, 32), "k": (2048, 512)}
_LENGTHS = ([131072], [1024, 2048])
# Length of the check: three quarters of the default budget are chosen from three times as many.
_CHECKED = {"tile": 1000, "block": 400, "token": 200}


class LayerBench(Benchmark):
    """Base: `shapes` are the cases asked for, `inputs` their tensors.

    Raises ValueError for options that cannot go together.
    """

    settings: LayerBenchSettings

    def __init__(self, settings: LayerBenchSettings) -> None:
        super().__init__(settings)
        s = settings
        cuda = s.device == "cuda" or (s.device == "auto" and torch.cuda.is_available())
        if cuda and not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch finds no CUDA device here")
        self.device = torch.device("cuda" if cuda else "cpu")
        name = s.dtype if s.dtype != "auto" else ("bfloat16" if cuda else "float32")
        self.dtype: torch.dtype = getattr(torch, name)
        if (s.inputs == "checkpoint") != bool(s.checkpoint):
            raise ValueError("--inputs checkpoint and --checkpoint PATH go together")
        lowest = {"heads": 0, "head_dim": 0, "k": 0, "key_block": 0, "index_heads": 1}
        for option, low in (lowest | {"index_dim": 1, "memory": 1, "sequences": 1}).items():
            if getattr(s, option) < low:
                raise ValueError(f"--{option.replace('_', '-')} must be at least {low}")
        if any(n < 1 for n in (*s.seq_len, *s.batch)):
            raise ValueError("--seq-len and --batch must be at least 1")
        if not s.layer or min(s.layer) < -1:
            raise ValueError("--layer must be at least -1")
        if not s.checkpoint and (s.layer != [-1] or s.sequences != 1):
            raise ValueError("--layer and --sequences are of a checkpoint: --checkpoint PATH")
        self.kv_heads = [n or _DEFAULTS["kv_heads"][not cuda] for n in s.kv_heads]
        heads = s.heads or _DEFAULTS["heads"][not cuda]
        if any(n < 1 or heads % n for n in self.kv_heads):
            raise ValueError(f"--kv-heads {s.kv_heads} do not divide --heads {heads}")
        self.captured: dict[int, dict[str, Any]] = {}
        try:
            self.granularities = [granularity(s.mode, s.key_block, r) for r in s.query_tile]
        except ValueError as error:  # it speaks of settings of a run
            text = str(error).replace("attention.key_block", "--key-block")
            raise ValueError(text.replace("attention.query_tile", "--query-tile")) from error
        self.lengths = s.seq_len or _LENGTHS[not cuda]
        for spec in self._specs():  # refused before anything is loaded or timed
            choose(s.impl, self.device, spec, s.head_dim or _DEFAULTS["head_dim"][not cuda])

    def _specs(self) -> Iterator[SelectionSpec]:
        for c, r in self.granularities:
            yield SelectionSpec(c, r, self.settings.window, self.settings.sinks)

    def load(self, progress: Progress) -> None:
        """The captured tensors, where they are asked for."""
        s = self.settings
        if s.inputs == "checkpoint" and not self.captured:
            tokens = max(self.lengths)
            sizes = (tokens, s.sequences)
            layers = captured(s.checkpoint, s.layer, *sizes, self.device, progress.say)
            self.captured = {found["layer"]: found for found in layers}
            held = layers[0]["q_BTHE"].shape[1]
            if tokens > held:
                raise UserError(
                    f"--checkpoint {s.checkpoint} holds {held} tokens, not {tokens}: capture a "
                    f"longer text (bench capture --tokens {tokens}), or type --seq-len {held}"
                )

    def shapes(self) -> Iterator[Shape]:
        """Every combination asked for, layers outermost, then lengths."""
        s, cpu = self.settings, self.device.type != "cuda"
        sizes: dict[str, int] = {
            "heads": s.heads or _DEFAULTS["heads"][cpu],
            "head_dim": s.head_dim or _DEFAULTS["head_dim"][cpu],
            "index_heads": s.index_heads,
            "index_dim": s.index_dim,
        }
        kv_heads = self.kv_heads
        if self.captured:
            sizes = shape_of_capture(next(iter(self.captured.values())))
            kv_heads = [sizes.pop("kv_heads")]
        layers, specs = self.captured or [-1], self._specs()
        parts = (layers, self.lengths, kv_heads, specs, s.batch, s.key_dtype)
        for layer, length, n, spec, batch, key_dtype in itertools.product(*parts):
            yield Shape(
                s.mode,
                spec,
                length,
                kv_heads=n,
                key_dtype=key_dtype,
                k=s.k or _DEFAULTS["k"][cpu],
                device=self.device,
                dtype=self.dtype,
                batch=batch,
                inputs=s.inputs,
                layer=layer,
                memory=s.memory,
                impl=s.impl,
                **sizes,
            )

    def inputs(self, shape: Shape, queries: int = 0) -> Case:
        return make_case(shape, self.captured.get(shape.layer), queries)

    def begin(self, progress: Progress) -> dict[str, Any]:
        """Check every granularity and number of heads; then the report with the rates measured.

        Raises WrongResultError: no time is taken of a wrong result.
        """
        report: dict[str, Any] = dict(environment(self.device))
        report["commit"] = self.settings.commit or report["commit"]
        report["checked"] = {}
        for shape in self._checked():
            label = f"C={shape.spec.key_block} R={shape.spec.query_tile} K={shape.kv_heads}"
            label += "" if shape.key_dtype == "auto" else f" {shape.key_dtype} index keys"
            label += f" layer {shape.layer}" if len(self.captured) > 1 else ""
            if label in report["checked"]:
                continue
            for name, case, backward in self.checks(shape, label):
                found, problems = wrong(case, backward)
                if problems:
                    raise WrongResultError(f"{name}: " + "; ".join(problems))
                report["checked"][name] = found
                worst = max(v for key, v in found.items() if key != "selection")
                progress.say(f"checked {name}: error {worst:.2f} x that of its precision")
        self.rates = rates(self.device, self.dtype)
        report["matmul_flops"], report["copy_bytes_s"] = self.rates.flops, self.rates.bytes_s
        report["records"] = []
        return report

    def checks(self, shape: Shape, label: str) -> Iterator[tuple[str, Case, bool]]:
        """What to check of a shape: (name, inputs, whether with gradients)."""
        yield label, self.inputs(shape), True

    def _checked(self) -> Iterator[Shape]:
        for shape in self.shapes():
            length = min(_CHECKED[shape.mode], max(self.lengths))
            forced = shape.spec.window + shape.spec.sink_keys
            budget = min(shape.k, forced + max(shape.spec.key_block, length // 4))
            yield replace(shape, seq_len=length, k=budget, batch=1)


def out_of_memory(error: Exception) -> bool:
    """Whether the device could not hold a case; its memory is given back then."""
    if not isinstance(error, torch.cuda.OutOfMemoryError):
        return False
    torch.cuda.empty_cache()
    return True
