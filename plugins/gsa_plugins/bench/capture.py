"""The inputs of one trained attention layer on real text: q, k, v, gates and index factors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gsa_kernels.bench.timing import environment
from gsa_kernels.index_score import IndexFactors
from gsa_platform.bench import Benchmark, Progress
from gsa_platform.contracts import Sequence
from gsa_platform.errors import UserError

from .settings import CaptureSettings

FORMAT = "gsa captured layer 1"


class CaptureBench(Benchmark):
    """`bench capture`: writes a file for --checkpoint of the other benchmarks."""

    settings: CaptureSettings

    def __init__(self, settings: CaptureSettings) -> None:
        super().__init__(settings)
        if not settings.checkpoint:
            raise ValueError("--checkpoint PATH is needed: a run folder or a .ckpt file")

    def run(self, progress: Progress) -> dict[str, Any]:
        s = self.settings
        cuda = s.device == "cuda" or (s.device == "auto" and torch.cuda.is_available())
        device = torch.device("cuda" if cuda else "cpu")
        tensors = capture(s.checkpoint, s.layer, s.tokens, device, progress.say)
        target = Path(s.tensors)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.part")
        torch.save(tensors, beside)
        beside.replace(target)
        report: dict[str, Any] = dict(environment(device))
        record = {k: v for k, v in tensors.items() if not isinstance(v, Tensor) and v is not None}
        shapes = {k: list(v.shape) for k, v in tensors.items() if isinstance(v, Tensor)}
        report["records"] = [record | {"file": str(target), "shapes": shapes}]
        return report

    def render(self, report: dict[str, Any]) -> str:
        (row,) = report["records"]
        lines = [f"{row['file']}: layer {row['layer']} of {row['source']}"]
        return "\n".join([*lines, *(f"  {k:<18} {v}" for k, v in row["shapes"].items())])


def captured(
    path: str, layer: int, tokens: int, device: torch.device, say: Callable[[str], None]
) -> dict[str, Any]:
    """Captured tensors of a file that `capture` wrote, or of a checkpoint, captured now."""
    if Path(path).suffix != ".pt":
        return capture(path, layer, tokens, device, say)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        good = tensors["format"] == FORMAT
    except Exception as error:  # whatever the bytes of another file lead the reader to
        raise UserError(f"--checkpoint {path} is no file of 'bench capture': {error}") from error
    if not good:
        raise UserError(f"--checkpoint {path} is of another version; run 'bench capture' again")
    assert isinstance(tensors, dict)
    return tensors


@torch.no_grad()
def capture(
    path: str, layer: int, tokens: int, device: torch.device, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run the checkpoint on its validation text once and keep what one layer was given, on the
    CPU (see gsa_kernels.bench.case.from_capture). tokens: 0 = the trained context; documents are
    ignored, the text is one sequence.

    Raises UserError where there is no such layer, or it has no first-party index factors.
    """
    from gsa_platform.eval.command import load

    context = [f"context={tokens}"] if tokens else []
    run = load([f"checkpoint={path}", *context])
    model = run.module.to(device).model
    number, target = _layer(list(model.blocks), layer)
    batch = next(iter(run.data.val_dataloader()), None)
    if batch is None:
        raise UserError("there is no validation text: data.val_fraction must be above 0")
    text = batch["tokens_BT"][:1].to(device)
    say(f"capture: layer {number} of {run.checkpoint}, {text.shape[1]:,} tokens")
    found: dict[str, Any] = {}

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.update(_inputs(module, *args, **kwargs))

    hook = target.register_forward_pre_hook(keep, with_kwargs=True)
    half = device.type == "cuda" and "bf16" in str(run.cfg.trainer.precision)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            model(text)
    finally:
        hook.remove()
    kept = {k: v.detach().cpu() if isinstance(v, Tensor) else v for k, v in found.items()}
    return kept | {"format": FORMAT, "source": str(run.checkpoint), "layer": number}


def _layer(blocks: list[Any], wanted: int) -> tuple[int, Any]:
    indexed = [i for i, b in enumerate(blocks) if b.attention.indexer is not None]
    if not indexed:
        raise UserError("no layer of this checkpoint has an indexer: train one with attention=gsa")
    number = indexed[len(indexed) // 2] if wanted < 0 else wanted
    if number not in indexed:
        raise UserError(f"layer {wanted} has no indexer; choose one of {indexed}")
    return number, blocks[number].attention


def _inputs(
    layer: Any, x_BTD: Tensor, rotary: Any, seq: Sequence, *_: Any, **__: Any
) -> dict[str, Any]:
    """What the layer computes of its input before it attends."""
    q, k, v = layer._qkv(x_BTD, rotary)
    gates = layer.gate(x_BTD) if layer.gate is not None else None
    spec = layer.attention.selection_spec(layer.sparsity)
    if layer.indexer.needs_attention:
        raise UserError(f"{type(layer.indexer).__name__} has no factors of its own to capture")
    f = layer.indexer(x_BTD, seq, spec)
    if not isinstance(f, IndexFactors):
        raise UserError(f"{type(layer.indexer).__name__} has no index factors to capture")
    return {
        "q_BTHE": q,
        "k_BSKE": k,
        "v_BSKE": v,
        "value_gate_BTKE": None if gates is None else gates.value_BTKE,
        "output_gate_BTHE": None if gates is None else gates.output_BTHE,
        "index_q_BTJI": f.q_BTJI,
        "index_k_BSI": f.k_BSI,
        "index_weight_BTJ": f.weight_BTJ,
        "index_bias_J": f.bias_J,
        "scale": f.scale,
        "activation": f.activation,
        "block_score": f.block_score,
    }
