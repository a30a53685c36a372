"""The inputs of trained attention layers on real text: q, k, v, gates and index factors."""

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
        sizes = (s.tokens, s.sequences)
        (tensors,) = capture(s.checkpoint, [s.layer], *sizes, device, progress.say)
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
    path: str,
    layers: list[int],
    tokens: int,
    sequences: int,
    device: torch.device,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Captured tensors of the file that `capture` wrote, which holds one layer, or of layers of a
    checkpoint, captured now."""
    if Path(path).suffix != ".pt":
        return capture(path, layers, tokens, sequences, device, say)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        good = tensors["format"] == FORMAT
    except Exception as error:  # whatever the bytes of another file lead the reader to
        raise UserError(f"--checkpoint {path} is no file of 'bench capture': {error}") from error
    if not good:
        raise UserError(f"--checkpoint {path} is of another version; run 'bench capture' again")
    assert isinstance(tensors, dict)
    return [tensors]


@torch.no_grad()
def capture(
    path: str,
    layers: list[int],
    tokens: int,
    sequences: int,
    device: torch.device,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Run the checkpoint on `sequences` validation texts and keep what each of the layers was
    given, on the CPU (see gsa_kernels.bench.case.from_capture). tokens: of a text, 0 = the trained
    context; documents are ignored, a text is one sequence.

    Raises UserError where there is no such layer, it has no first-party index factors, or there
    are fewer texts.
    """
    from gsa_platform.eval.command import load

    more = [f"context={tokens}"] if tokens else []
    run = load([f"checkpoint={path}", f"train.val_batches={sequences}", *more])
    model = run.module.to(device).model
    targets = dict(_layer(list(model.blocks), layer) for layer in layers)
    batches = [batch["tokens_BT"] for batch in run.data.val_dataloader()]
    if not batches:
        raise UserError("there is no validation text: data.val_fraction must be above 0")
    texts = torch.cat(batches)[:sequences].to(device)
    if len(texts) < sequences:
        raise UserError(f"there are only {len(texts)} validation texts, not {sequences}")
    numbers = " ".join(map(str, targets))
    say(f"capture: layers {numbers} of {run.checkpoint}, {len(texts)} x {texts.shape[1]:,} tokens")
    half = device.type == "cuda" and "bf16" in str(run.cfg.trainer.precision)
    found: dict[int, list[dict[str, Any]]] = {number: [] for number in targets}

    def keep(number: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = _inputs(module, *args, **kwargs).items()
            kept = {k: v.detach().cpu() if isinstance(v, Tensor) else v for k, v in given}
            found[number].append(kept)

        return hook

    hooks = [
        target.register_forward_pre_hook(keep(number), with_kwargs=True)
        for number, target in targets.items()
    ]
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            for text in texts:
                model(text[None])
    finally:
        for hook in hooks:
            hook.remove()
    same = {"format": FORMAT, "source": str(run.checkpoint)}
    return [_joined(parts) | same | {"layer": number} for number, parts in found.items()]


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What a layer computed of each sequence, as one batch; its parameters and settings once."""
    first = parts[0]
    batched = [k for k, v in first.items() if isinstance(v, Tensor) and k != "index_bias_J"]
    return first | {k: torch.cat([part[k] for part in parts]) for k in batched}


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
