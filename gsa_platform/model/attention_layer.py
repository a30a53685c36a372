"""The attention layer: projections, rotary embedding and the four slots around them.

x -> q, k, v -> value gate -> indexer -> selection -> attention -> output gate -> projection
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gsa_platform.contracts import (
    Attention,
    Gate,
    Indexer,
    LayerDims,
    Objective,
    Sequence,
    Sparsity,
)
from gsa_platform.errors import UserError
from gsa_platform.model.rope import apply_rotary


@dataclass
class Components:
    """The slots of one layer; None where nothing is plugged in. fused_gate: the attention
    multiplies by the output gate itself."""

    attention: Attention
    indexer: Indexer | None = None
    sparsity: Sparsity | None = None
    gate: Gate | None = None
    objective: Objective | None = None
    fused_gate: bool = False


_SPARE = 64  # positions, beside half of what there is, that a cache's buffer has to spare


@dataclass(frozen=True)
class _Room:
    """A buffer and the view of its first positions that was given out last. Only positions behind
    that view are ever written."""

    buffer: Tensor
    given: Tensor
    inference: bool  # made in inference mode, outside of which it must not be written


@dataclass
class LayerCache:
    """What decoding keeps of one layer: keys, gated values, index keys, the unfinished tile.

    Positions are added with `extend`. The tensors may be views of longer buffers.
    """

    k_BSKE: Tensor | None = None
    v_BSKE: Tensor | None = None
    index_k_BSI: Tensor | None = None
    index_pooled_BMI: Tensor | None = None  # of whole blocks of index keys, where factors pool
    tail: Any = None
    bias: Tensor | None = None

    _room: dict[str, _Room] = field(default_factory=dict, repr=False)

    def extend(self, name: str, new: Tensor) -> Tensor:
        """Add positions (dimension 1) to the tensor called `name`, and return the whole of it.

        Where no gradient is wanted a token costs its own rows, not a copy of all that came
        before: they are written into a buffer with room to grow.
        """
        old = getattr(self, name)
        if old is None:
            whole = new
        elif old.dtype != new.dtype or (
            torch.is_grad_enabled() and (old.requires_grad or new.requires_grad)
        ):
            # Types of one byte do not promote; they come with and without gradients.
            wide = old.dtype if old.dtype.itemsize > new.dtype.itemsize else new.dtype
            whole = torch.cat([old.to(wide), new.to(wide)], 1)
        else:
            whole = self._write(name, old, new)
        setattr(self, name, whole)
        return whole

    def _write(self, name: str, old: Tensor, new: Tensor) -> Tensor:
        length, total = old.shape[1], old.shape[1] + new.shape[1]
        room = self._room.get(name)
        # A compiler cannot trace the question.
        inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
        if (
            room is None
            # Another copy of this cache, or whoever set the tensor, may have gone another way.
            or room.given is not old
            or room.inference != inference
            or room.buffer.shape[1] < total
        ):
            shape = (old.shape[0], total + total // 2 + _SPARE, *old.shape[2:])
            room = _Room(old.new_empty(shape), old, inference)
            room.buffer[:, :length] = old
        room.buffer[:, length:total] = new
        whole = room.buffer[:, :total]
        self._room[name] = _Room(room.buffer, whole, inference)
        return whole


@dataclass
class LayerReport:
    """What a layer says about one forward pass, all detached but the losses."""

    index_loss: Tensor | None = None
    budget_loss: Tensor | None = None
    keys: dict[str, Tensor] = field(default_factory=dict)  # mean, min, max keys per query
    gates: dict[str, Tensor] = field(default_factory=dict)  # of sizes: mean, share below 0.1
    statistics: dict[str, Tensor] = field(default_factory=dict)  # mean score statistics
    probe: dict[str, Tensor] = field(default_factory=dict)  # only on probed passes, as are:
    keys_BHT: Tensor | None = None  # keys attended by each query
    saturated: Tensor | None = None  # share of the index logits, where the factors tell it
    gate_values: dict[str, Tensor] = field(default_factory=dict)


class AttentionLayer(nn.Module):
    """Causal self-attention with pluggable parts. Shapes as in contracts.py."""

    def __init__(
        self, dims: LayerDims, parts: Components, qk_norm: bool, norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.dims = dims
        width, kv_width = dims.n_heads * dims.head_dim, dims.n_kv_heads * dims.head_dim
        self.q_proj = nn.Linear(dims.d_model, width, bias=False)
        self.k_proj = nn.Linear(dims.d_model, kv_width, bias=False)
        self.v_proj = nn.Linear(dims.d_model, kv_width, bias=False)
        self.o_proj = nn.Linear(width, dims.d_model, bias=False)
        self.q_norm = nn.RMSNorm(dims.head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(dims.head_dim, eps=norm_eps) if qk_norm else None
        self.attention, self.indexer, self.sparsity = (
            parts.attention,
            parts.indexer,
            parts.sparsity,
        )
        self.gate, self.objective = parts.gate, parts.objective
        self.fused_gate = parts.fused_gate
        if self.objective is not None and self.indexer is not None:
            if next(self.indexer.parameters(), None) is None:
                raise UserError(
                    f"objective {type(self.objective).__name__} trains an indexer, but "
                    f"{type(self.indexer).__name__} has no parameters. Type objective=none, or "
                    "another indexer."
                )

    def warming_up(self, seq: Sequence) -> bool:
        """Whether this step attends densely while the indexer warms up."""
        return (
            self.indexer is not None and self.objective is not None and self.objective.dense(seq)
        )

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        seq: Sequence,
        cache: LayerCache | None = None,
        probe: bool = False,
        warm_up: bool = False,
    ) -> tuple[Tensor, LayerReport]:
        """warm_up: attend to every key, as `warming_up` says of this step."""
        q, k, v = self._qkv(x_BTD, rotary)
        report = LayerReport()
        gates = self.gate(x_BTD) if self.gate is not None else None
        if gates is not None and gates.value_BTKE is not None:
            v = v * gates.value_BTKE.to(v.dtype)
            report.gates.update(_gate_summary("value", gates.value_BTKE))
        if cache is not None:
            k, v = cache.extend("k_BSKE", k), cache.extend("v_BSKE", v)
        output_gate = None if gates is None else gates.output_BTHE
        fused = {"gate": output_gate} if self.fused_gate and output_gate is not None else {}
        if self.indexer is None:
            out = self.attention(q, k, v, None, seq, **fused).out_BTHE
            selection = None
        else:
            out, selection = self._select_and_attend(
                x_BTD, q, k, v, seq, cache, report, warm_up, fused, probe
            )
        if probe:
            report.probe = self.attention.probe(q.detach(), k.detach(), selection, seq)
            report.keys_BHT = None if selection is None else selection.attended_BHT()
            if gates is not None:
                for name, value in (("value", gates.value_BTKE), ("output", gates.output_BTHE)):
                    if value is not None:
                        report.gate_values[name] = value.detach()
        if output_gate is not None:
            out = out if fused else out * output_gate.to(out.dtype)
            report.gates.update(_gate_summary("output", output_gate))
        return self.o_proj(out.flatten(2)), report

    def _qkv(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        width = (-1, self.dims.head_dim)
        q = self.q_proj(x_BTD).unflatten(-1, width)
        k = self.k_proj(x_BTD).unflatten(-1, width)
        v = self.v_proj(x_BTD).unflatten(-1, width)
        if self.q_norm is not None and self.k_norm is not None:
            # In the weight's precision: a mixture of both has no fused kernel.
            high = self.q_norm.weight.dtype
            q, k = self.q_norm(q.to(high)).to(v.dtype), self.k_norm(k.to(high)).to(v.dtype)
        return apply_rotary(q, *rotary), apply_rotary(k, *rotary), v

    def _select_and_attend(
        self,
        x_BTD: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seq: Sequence,
        cache: LayerCache | None,
        report: LayerReport,
        warm_up: bool,
        fused: dict[str, Tensor],
        probe: bool,
    ) -> tuple[Tensor, Any]:
        assert self.indexer is not None and self.sparsity is not None
        objective = self.objective
        detach = objective is None or objective.detach_indexer
        spec = self.attention.selection_spec(self.sparsity)
        x_index = x_BTD.detach() if detach else x_BTD
        if self.indexer.needs_attention:
            factors = self.indexer(x_index, seq, spec, q_BTHE=q.detach(), k_BSKE=k.detach())
        else:
            factors = self.indexer(x_index, seq, spec)
        if cache is not None:
            factors = factors.with_keys(cache.extend("index_k_BSI", factors.k_BSI))
            if hasattr(factors, "remember"):
                factors = factors.remember(cache)
        if probe and hasattr(factors, "saturated"):
            report.saturated = factors.saturated()
        if warm_up and objective is not None:
            out = self.attention(q, k, v, None, seq, **fused).out_BTHE
            report.index_loss = objective.loss(factors, spec, None, None, q, k, seq)
            return out, None
        previous = cache.tail if cache is not None else None
        choice = self.indexer.select(factors, spec, self.sparsity, seq, previous)
        bias = None
        if objective is not None:
            bias = objective.bias(factors, choice.selection, cache.bias if cache else None)
        learn = self.training and torch.is_grad_enabled()
        need_mass = learn and objective is not None and objective.need_mass
        result = self.attention(
            q, k, v, choice.selection, seq, bias=bias, need_mass=need_mass, **fused
        )
        if need_mass and result.mass is None:
            raise ValueError(
                f"{type(self.attention).__name__} returned no mass, which "
                f"{type(objective).__name__} asked for: its Capabilities need mass=False"
            )
        if learn and objective is not None:
            report.index_loss = objective.loss(
                factors, spec, choice.selection, result.mass, q, k, seq
            )
        if learn:
            report.budget_loss = self.sparsity.loss(factors, choice, q.detach(), k.detach(), seq)
        if cache is not None:
            cache.tail = choice.selection.tail()
            cache.bias = None if bias is None else bias.detach()[:, :, -1:]
        report.keys = _key_summary(choice.selection)
        report.statistics = _mean_statistics(choice.statistics)
        return result.out_BTHE, choice.selection


@torch.no_grad()
def _gate_summary(name: str, gate: Tensor) -> dict[str, Tensor]:
    gate = gate.detach().abs()
    return {f"{name}_mean": gate.float().mean(), f"{name}_low": (gate < 0.1).float().mean()}


@torch.compiler.disable
@torch.no_grad()
def _mean_statistics(statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean of each over the tiles that had anything to choose from."""
    count = statistics.get("count")
    if count is None:
        return {name: value.float().mean((0, 1, 2)) for name, value in statistics.items()}
    known = count > 0
    found = {}
    for name, value in statistics.items():
        weight = known.view(*known.shape, *[1] * (value.ndim - known.ndim))
        found[name] = (value.float() * weight).sum((0, 1, 2)) / known.sum().clamp_min(1)
    return found


@torch.compiler.disable
@torch.no_grad()
def _key_summary(selection: Any) -> dict[str, Tensor]:
    keys = selection.attended_BHT().float()
    return {"mean": keys.mean(), "min": keys.min(), "max": keys.max()}
