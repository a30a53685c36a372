"""What attention costs in one layer, as configured and dense, measured at the full context.

Both are forward + backward on the same random hidden states. The configured cost is the layer's
time less that of the same layer with its attention taken out, so scoring, selection and the
indexer's loss are inside. Dense attention on a CPU is timed on one head, since heads are
independent and cost the same, and multiplied; `note` says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gsa_platform.contracts import Attention, AttentionOutput, LayerDims, Sequence
from gsa_platform.model.attention_layer import AttentionLayer, Components
from gsa_platform.module import LanguageModel
from gsa_platform.registry import Registry


class _Passthrough(Attention):
    """Values straight to the output: a layer without any attention."""

    def forward(self, q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, *_: Any, **__: Any):  # type: ignore[no-untyped-def]
        return AttentionOutput(
            q_BTHE + v_BSKE.repeat_interleave(q_BTHE.shape[2] // v_BSKE.shape[2], 2)
        )


def measure_attention(
    module: LanguageModel, cfg: Any, registry: Registry, device: torch.device
) -> dict[str, Any]:
    """Seconds for one layer and one sequence on `device`, forward + backward:

    sparse_attention_s (the configured attention, whatever it is), dense_attention_s, and note.
    Uses the first layer that takes the configured attention.
    """
    module.to(device)  # the trainer leaves it on the CPU when it is done
    layer = _configured_layer(module)
    dims = layer.dims
    dtype = torch.bfloat16 if "bf16" in cfg.trainer.precision else torch.float32
    x = torch.randn(1, cfg.context, dims.d_model, device=device).requires_grad_()
    rotary = module.model.rotary.cos_sin(torch.arange(cfg.context, device=device))
    seq = Sequence(step=module.global_step)
    bare = AttentionLayer(
        dims, Components(_Passthrough(), gate=layer.gate), layer.q_norm is not None
    )
    bare.to(device)

    def run(part: AttentionLayer) -> Callable[[], None]:
        def once() -> None:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                out, report = part(x, rotary, seq)
            loss = out.float().square().mean()
            if report.index_loss is not None:
                loss = loss + report.index_loss
            loss.backward()

        return once

    layer.train()
    repeats = 3 if device.type == "cuda" else 1
    own = max(1e-9, seconds(run(layer), device, repeats) - seconds(run(bare), device, repeats))
    module.zero_grad(set_to_none=True)
    heads = dims.n_heads if device.type == "cuda" else 1
    dense = dense_seconds(registry, dims, cfg.context, heads, device, dtype, repeats)
    note = "measured on one layer, forward + backward"
    if heads < dims.n_heads:
        dense *= dims.n_heads / heads
        note += f"; dense on {heads} of its {dims.n_heads} equal heads"
    return {"sparse_attention_s": own, "dense_attention_s": dense, "dense_note": note}


def dense_seconds(
    registry: Registry,
    dims: LayerDims,
    context: int,
    heads: int,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
) -> float:
    """Forward + backward of the component `dense` on `heads` query heads."""
    dense = registry.build("attention", {"name": "dense"}, dims)
    kv_heads = dims.n_kv_heads if heads == dims.n_heads else 1
    q, k, v = (
        torch.randn(1, context, n, dims.head_dim, device=device, dtype=dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )

    def once() -> None:
        dense(q, k, v, None, Sequence()).out_BTHE.sum().backward()

    return seconds(once, device, repeats, warm=device.type == "cuda")


def seconds(
    run: Callable[[], None], device: torch.device, repeats: int, warm: bool = True
) -> float:
    """Median wall time of `run`, after one untimed call if `warm`."""
    if warm:
        run()
    times = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _configured_layer(module: LanguageModel) -> AttentionLayer:
    layers = [block.attention for block in module.model.blocks]
    return next((layer for layer in layers if layer.indexer is not None), layers[-1])
