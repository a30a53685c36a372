"""The decoder-only transformer: RMSNorm, rotary grouped-query attention, SwiGLU, tied embeddings.

Legend: B batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gsa_platform.components import SLOTS
from gsa_platform.contracts import LayerDims, Sequence
from gsa_platform.errors import UserError
from gsa_platform.model.attention_layer import AttentionLayer, Components, LayerCache, LayerReport
from gsa_platform.model.layer_pattern import expand_pattern
from gsa_platform.model.rope import RotaryTable
from gsa_platform.registry import Registry


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, d_model: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, ffn_dim, bias=False)
        self.up_proj = nn.Linear(d_model, ffn_dim, bias=False)
        self.down_proj = nn.Linear(ffn_dim, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm residual block: attention, then feed-forward."""

    def __init__(self, layer: AttentionLayer, ffn_dim: int, norm_eps: float) -> None:
        super().__init__()
        d_model = layer.dims.d_model
        self.attention_norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.attention = layer
        self.ffn_norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.ffn = SwiGLU(d_model, ffn_dim)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        seq: Sequence,
        cache: LayerCache | None = None,
        probe: bool = False,
        warm_up: bool = False,
    ) -> tuple[Tensor, LayerReport]:
        out, report = self.attention(
            self.attention_norm(x_BTD), rotary, seq, cache, probe, warm_up
        )
        x_BTD = x_BTD + out
        return x_BTD + self.ffn(self.ffn_norm(x_BTD)), report


@dataclass
class ModelOutput:
    """hidden_BTD after the final norm (logits are hidden @ head_weight.T), one report a layer."""

    hidden_BTD: Tensor
    reports: list[LayerReport] = field(default_factory=list)


class Transformer(nn.Module):
    """A language model over `vocab_size` tokens, its layers built from the configured slots."""

    blocks: Iterable[Block]  # an nn.ModuleList, typed by what it holds

    def __init__(self, cfg: Any, vocab_size: int, registry: Registry) -> None:
        """cfg: the resolved configuration (keys model, context and the five slots)."""
        super().__init__()
        m = cfg.model
        head_dim = m.head_dim or m.d_model // m.n_heads
        self.activation_checkpointing = bool(cfg.train.activation_checkpointing)
        self.rotary = RotaryTable(head_dim, m.rope_theta, m.rope_scaling)
        self.embedding = nn.Embedding(vocab_size, m.d_model)
        pattern = expand_pattern(list(m.layer_pattern), m.n_layers)
        self.undecodable = _without_decode(cfg, registry, pattern)
        self.attention_names = [cfg.attention.name if n == "*" else n for n in pattern]
        blocks = []
        for i, name in enumerate(pattern):
            dims = LayerDims(
                m.d_model,
                m.n_heads,
                m.n_kv_heads,
                head_dim,
                cfg.context,
                i,
                m.n_layers,
                m.rope_theta,
            )
            layer = AttentionLayer(
                dims, _components(cfg, registry, name, dims), m.qk_norm, m.norm_eps
            )
            blocks.append(Block(layer, ffn_width(m.d_model, m.ffn_dim), m.norm_eps))
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.norm = nn.RMSNorm(m.d_model, eps=m.norm_eps)
        self.head = None if m.tie_embeddings else nn.Linear(m.d_model, vocab_size, bias=False)
        self.init_weights()

    @property
    def head_weight_VD(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def init_weights(self) -> None:
        """Initial weights, normal with the standard deviation given:

        embedding, untied head      0.02
        q, k, v, ffn gate and up    1 / sqrt(inputs)
        o_proj, ffn down            1 / sqrt(inputs) / sqrt(2 layers)
        indexer, gates              their own reset_parameters
        """
        nn.init.normal_(self.embedding.weight, std=0.02)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)
        shrink = (2 * len(list(self.blocks))) ** -0.5
        for block in self.blocks:
            a, f = block.attention, block.ffn
            for proj in (a.q_proj, a.k_proj, a.v_proj, f.gate_proj, f.up_proj):
                nn.init.normal_(proj.weight, std=proj.in_features**-0.5)
            for proj in (a.o_proj, f.down_proj):
                nn.init.normal_(proj.weight, std=shrink * proj.in_features**-0.5)

    def forward(
        self,
        tokens_BT: Tensor,
        doc_start_BS: Tensor | None = None,
        step: int = 0,
        cache: list[LayerCache] | None = None,
        probe: bool = False,
    ) -> ModelOutput:
        """Hidden states of the tokens, which continue the cache if there is one.

        doc_start_BS covers every key, cached ones included.
        """
        start = 0
        if cache is not None and cache[0].k_BSKE is not None:
            start = cache[0].k_BSKE.shape[1]
        seq = Sequence(start, doc_start_BS, step)
        x = self.embedding(tokens_BT)
        position = torch.arange(start, start + tokens_BT.shape[1], device=tokens_BT.device)
        rotary = self.rotary.cos_sin(position)
        reports = []
        for i, block in enumerate(self.blocks):
            held = None if cache is None else cache[i]
            # Decided here: a compiled block that read the step would be compiled at every step.
            rest = (rotary, seq, held, probe, block.attention.warming_up(seq))
            if self.activation_checkpointing and self.training and held is None:
                x, report = checkpoint(block, x, *rest, use_reentrant=False)
            else:
                x, report = block(x, *rest)
            reports.append(report)
        return ModelOutput(self.norm(x), reports)

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block by itself, in place: equal layers share the compiled code, and
        parameters keep their names. options go to torch.compile."""
        # Entries of the compiler's cache that fit two kinds of layers, tried in the order of last
        # use, would give a block one graph in the forward pass and another when activation
        # checkpointing recomputes it (pytorch issue 166926).
        torch._C._dynamo.eval_frame._set_lru_cache(False)  # type: ignore[attr-defined]
        for block in self.blocks:
            block.compile(**options)

    def new_cache(self) -> list[LayerCache]:
        """An empty cache; raises UserError if a component declares that it cannot decode."""
        if self.undecodable:
            raise UserError(
                f"{', '.join(self.undecodable)} cannot decode token by token (decode=False in its "
                "capabilities). Choose another component to generate or to score with a cache."
            )
        return [LayerCache() for _ in self.blocks]

    def observe(self, statistics: list[dict[str, Tensor]]) -> None:
        """Hand each layer's mean score statistics of a step to its sparsity controller."""
        for block, values in zip(self.blocks, statistics, strict=True):
            sparsity = block.attention.sparsity
            if sparsity is not None and values:
                sparsity.observe(values)

    def describe(self, device_type: str) -> list[str]:
        """One line per distinct implementation of attention, selection and objective, with the
        layers that use it.

        Raises UserError if one that was asked for by name cannot run on the device.
        """
        lines: dict[str, list[int]] = {}
        for i, (name, block) in enumerate(zip(self.attention_names, self.blocks)):
            for line in _implementations(name, block.attention, device_type):
                lines.setdefault(line, []).append(i)
        return [
            f"layer{'s' if len(layers) > 1 else ''} {_ranges(layers)}: {line}"
            for line, layers in lines.items()
        ]


def _implementations(name: str, layer: AttentionLayer, device_type: str) -> Iterable[str]:
    attention, indexer, sparsity = layer.attention, layer.indexer, layer.sparsity
    try:
        yield attention.describe(device_type) or type(attention).__name__
    except ValueError as error:
        raise UserError(f"attention={name}: {error}") from error
    if indexer is None or sparsity is None:
        return
    spec = attention.selection_spec(sparsity)
    if line := indexer.describe(device_type, spec, sparsity):
        yield f"selection: {line}"
    if layer.objective is not None:
        if line := layer.objective.describe(device_type, spec, indexer):
            yield f"objective: {line}"


def ffn_width(d_model: int, ffn_dim: int) -> int:
    """Width of the feed-forward; 0 takes SwiGLU's 8/3 d_model rounded up to a multiple of 64."""
    return ffn_dim or -(-8 * d_model // 3 // 64) * 64


def _components(cfg: Any, registry: Registry, name: str, dims: LayerDims) -> Components:
    """The slots of one layer. An attention without a Selection takes no indexer."""
    configured = name in ("*", cfg.attention.name)
    attention = registry.build("attention", cfg.attention if configured else {"name": name}, dims)
    gate = registry.build("gate", cfg.gate, dims)
    can = registry.component("attention", cfg.attention.name if configured else name).capabilities
    if not can.modes:
        return Components(attention, gate=gate, fused_gate=can.fused_gate)
    return Components(
        attention,
        registry.build("indexer", cfg.indexer, dims),
        registry.build("sparsity", cfg.sparsity, dims),
        gate,
        registry.build("objective", cfg.objective, dims),
        can.fused_gate,
    )


def _without_decode(cfg: Any, registry: Registry, pattern: list[str]) -> list[str]:
    """`slot=name` of every component in use that declares decode=False."""
    names = {("attention", cfg.attention.name if n == "*" else n) for n in pattern}
    names |= {(slot, cfg[slot].name) for slot in SLOTS if slot != "attention"}
    return sorted(
        f"{slot}={name}"
        for slot, name in names
        if not registry.component(slot, name).capabilities.decode
    )


def _ranges(numbers: list[int]) -> str:
    parts: list[str] = []
    start = previous = numbers[0]
    for n in [*numbers[1:], -1]:
        if n != previous + 1:
            parts.append(str(start) if start == previous else f"{start}-{previous}")
            start = n
        previous = n
    return ", ".join(parts)
