"""Inputs of one attention layer at one shape, and the whole path that is timed over them.

Legend: B batch, T queries, S keys, H query heads, K key-value heads, E head width, J index heads,
I index width, C keys per block, R queries per tile.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gsa_kernels.index_score import IndexFactors
from gsa_kernels.index_score.fp8 import fp8_keys
from gsa_kernels.indexer_loss.api import selected_kl
from gsa_kernels.select.api import _rows, choose, select
from gsa_kernels.selection import Selection, SelectionSpec, n_tiles
from gsa_kernels.sparse_attention import sparse_attention

COLD, MOST_COPIES = 1 << 27, 8  # bytes: more than an L2 cache holds


@dataclass(frozen=True)
class Shape:
    """What is measured; counts are keys, queries or heads. key_dtype: of the index keys, auto (as
    the queries), bf16 or fp8 (see index_score.fp8). inputs: where the tensors come from:
    independent random numbers (the worst case), random index queries that change slowly over
    `memory` positions, or a checkpoint's layer, whose number is `layer`."""

    mode: str
    spec: SelectionSpec
    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    k: int
    device: torch.device
    dtype: torch.dtype
    batch: int = 1
    index_heads: int = 4
    index_dim: int = 64
    key_dtype: str = "auto"
    inputs: str = "random"
    layer: int = -1
    memory: int = 256
    impl: str = "auto"

    def fields(self) -> dict[str, Any]:
        """As a record of a report names them."""
        layer = {"layer": self.layer} if self.inputs == "checkpoint" else {}
        return {
            "mode": self.mode,
            **layer,
            "C": self.spec.key_block,
            "R": self.spec.query_tile,
            "batch": self.batch,
            "seq_len": self.seq_len,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "k": self.k,
            "window": self.spec.window,
            "sinks": self.spec.sinks,
            "index_heads": self.index_heads,
            "index_dim": self.index_dim,
            "key_dtype": self.key_dtype,
            "dtype": str(self.dtype).removeprefix("torch."),
            "inputs": self.inputs,
            "impl": self.impl,
        }


@dataclass(frozen=True)
class Case:
    """q_BTHE, k_BSKE, v_BSKE, both gates (None: the layer has none) and index factors."""

    q: Tensor
    k: Tensor
    v: Tensor
    value_gate: Tensor | None
    output_gate: Tensor | None
    factors: IndexFactors
    spec: SelectionSpec
    budget: int
    impl: str

    @property
    def leaves(self) -> list[Tensor]:
        f = self.factors
        parts = [self.q, self.k, self.v, self.value_gate, self.output_gate]
        parts += [f.q_BTJI, f.k_BSI, f.weight_BTJ, f.bias_J]
        return [x for x in parts if x is not None]

    def each(self, change: Callable[[Tensor], Tensor]) -> "Case":
        """The same case with every tensor changed."""

        def done(x: Tensor | None) -> Any:
            return None if x is None else change(x)

        f = self.factors
        scored = ("q_BTJI", "k_BSI", "weight_BTJ", "bias_J")
        factors = replace(f, **{n: done(getattr(f, n)) for n in scored})
        attended = ("q", "k", "v", "value_gate", "output_gate")
        return replace(self, factors=factors, **{n: done(getattr(self, n)) for n in attended})

    def learn(self) -> "Case":
        """The same numbers as leaves that take gradients, FP8 keys as training holds them."""
        wide = replace(self, factors=self.factors.with_keys(self.factors.keys_BSI))
        return wide.each(lambda x: x.detach().requires_grad_())

    def copies(self) -> list["Case"]:
        """This case and as many copies as it takes, used in turn, to read no tensor from a cache
        that still holds it from the last time."""
        size = sum(x.numel() * x.element_size() for x in self.leaves)
        n = 1 if self.q.device.type == "cpu" else min(MOST_COPIES, -(-COLD // size))
        return [self, *(self.each(torch.clone) for _ in range(n - 1))]

    def choose(self, previous: Selection | None = None) -> Selection:
        """Scoring and selection."""
        n = self.q.shape[1]
        args = (self.factors, self.spec, self.budget, self.budget, n)
        return select(*args, previous=previous).selection

    def score(self) -> None:
        """Scoring alone, by the implementation that `select` takes. Single keys of long rows are
        scored where they are chosen (see select.triton_filter), and so not here."""
        spec, f, n = self.spec, self.factors, self.q.shape[1]
        name, _ = choose("auto", f, spec, self.budget)
        width = spec.max_blocks(self.budget, f.k_BSI.shape[1])
        rows = _rows(name, f, spec, n, None, width=width)
        tile, tiles, first = 0, n_tiles(spec, n, f.q_start), f.q_start // spec.query_tile
        while tile < tiles:
            stop = min(tiles, rows.stop(tile))
            anchor = (first + stop - 1) * spec.query_tile
            n_blocks = max(0, anchor - spec.window + 1) // spec.key_block
            if n_blocks:
                rows.score(slice(tile, stop), n_blocks)
            tile = stop

    @property
    def gated_values(self) -> Tensor:
        return self.v if self.value_gate is None else self.v * self.value_gate

    def attend(self, selection: Selection, learn: bool = False) -> tuple[Tensor, Tensor | None]:
        """(gated output, KL on the selected keys if `learn`)."""
        result = sparse_attention(
            self.q,
            self.k,
            self.gated_values,
            selection,
            gate_BTHE=self.output_gate,
            need_mass=learn,
            impl=self.impl,
        )
        out = result.out_BTHE
        if not learn:
            return out, None
        assert result.mass_BHQN is not None
        return out, selected_kl(self.factors, selection, result.mass_BHQN, "log")

    def forward(self, previous: Selection | None = None) -> Tensor:
        """The whole path: scoring, selection, gates, attention."""
        return self.attend(self.choose(previous))[0]

    def train(self, dout: Tensor) -> None:
        """The whole path forward and backward, with the KL on the selected keys."""
        out, loss = self.attend(self.choose(), learn=True)
        assert loss is not None
        outputs, gradients = [out], [dout]
        if loss.requires_grad:  # not if nothing was selected beside window and sinks
            outputs, gradients = [out, loss], [dout, torch.ones_like(loss)]
        torch.autograd.grad(outputs, self.leaves, gradients, allow_unused=True)

    def query(self, index: int) -> "Case":
        """One query alone, as if it were the last of the keys, which are a cache; values are
        cached with their gate."""
        at, f = slice(index, index + 1), self.factors
        gate = None if self.output_gate is None else self.output_gate[:, at]
        factors = replace(
            f,
            q_BTJI=f.q_BTJI[:, at],
            weight_BTJ=f.weight_BTJ[:, at],
            q_start=self.k.shape[1] - 1,
        )
        return replace(
            self,
            q=self.q[:, at],
            v=self.gated_values,
            value_gate=None,
            output_gate=gate,
            factors=factors,
        )


def make_case(
    shape: Shape, captured: dict[str, Any] | None = None, queries: int = 0, seed: int = 0
) -> Case:
    """The inputs of a shape; with `queries` only so many last ones, of seq_len keys in a cache.

    captured: the tensors of a layer (see `from_capture`), for inputs="checkpoint".
    """
    if shape.inputs == "checkpoint":
        assert captured is not None
        case = from_capture(shape, captured, queries)
    else:
        case = _drawn(shape, queries, seed)
    if shape.key_dtype == "auto":
        return case
    with torch.no_grad():
        wide = case.factors.k_BSI
        keys = fp8_keys(wide) if shape.key_dtype == "fp8" else wide.to(torch.bfloat16)
    return replace(case, factors=case.factors.with_keys(keys))


def _drawn(shape: Shape, queries: int, seed: int) -> Case:
    g = torch.Generator(shape.device).manual_seed(seed)
    e, j, i = shape.head_dim, shape.index_heads, shape.index_dim
    keys, rows = shape.seq_len, queries or shape.seq_len

    def draw(*size: int, rand: Callable[..., Tensor] = torch.randn) -> Tensor:
        return rand(shape.batch, *size, device=shape.device, dtype=shape.dtype, generator=g)

    index_q = draw(rows, j, i)
    if shape.inputs == "smooth":
        index_q = _smooth(index_q, shape.memory)
    factors = IndexFactors(
        index_q,
        draw(keys, i),
        draw(rows, j, rand=torch.rand),
        torch.zeros(j, device=shape.device, dtype=shape.dtype),
        i**-0.5,
        heads=shape.spec.heads,
        q_start=keys - rows,
    )
    kv = (keys, shape.kv_heads, e)
    return Case(
        draw(rows, shape.heads, e),
        draw(*kv),
        draw(*kv),
        None if queries else draw(*kv, rand=torch.rand),
        draw(rows, shape.heads, e, rand=torch.rand),
        factors,
        shape.spec,
        shape.k,
        shape.impl,
    )


def _smooth(x_BTJI: Tensor, memory: int) -> Tensor:
    """Index queries that change slowly, as those of text do: means over `memory` positions, scaled
    back to unit variance. Neighbours then choose nearly the same keys."""
    padded = F.pad(x_BTJI.double(), (0, 0, 0, 0, memory - 1, 0))
    total = F.pad(padded, (0, 0, 0, 0, 1, 0)).cumsum(1)
    mean = (total[:, memory:] - total[:, :-memory]) / memory**0.5
    return mean.to(x_BTJI.dtype)


def from_capture(shape: Shape, captured: dict[str, Any], queries: int = 0) -> Case:
    """The first seq_len tokens of captured tensors, whose sequences a batch takes in turn; with
    `queries` only so many last ones, and values with their gate.

    captured: q_BTHE, k_BSKE, v_BSKE (before its gate), value_gate_BTKE and output_gate_BTHE (or
    None), index_q_BTJI, index_k_BSI, index_weight_BTJ, index_bias_J (or None), and the numbers
    scale, activation, block_score. Raises ValueError if seq_len is longer than what there is.
    """
    held = captured["q_BTHE"].shape[1]
    if shape.seq_len > held:
        raise ValueError(
            f"the captured layer holds {held} tokens, not {shape.seq_len}: capture a longer text, "
            f"or measure at most {held}"
        )

    def take(name: str, low: int = 0) -> Any:
        x = captured[name]
        if x is None:
            return None
        x = x[[i % len(x) for i in range(shape.batch)], low : shape.seq_len]
        return x.to(shape.device, shape.dtype).contiguous()

    low = shape.seq_len - queries if queries else 0
    bias = captured["index_bias_J"]
    factors = IndexFactors(
        take("index_q_BTJI", low),
        take("index_k_BSI"),
        take("index_weight_BTJ", low),
        None if bias is None else bias.to(shape.device, shape.dtype),
        captured["scale"],
        captured["activation"],
        captured["block_score"],
        shape.spec.heads,
        low,
    )
    q, k, v = take("q_BTHE", low), take("k_BSKE"), take("v_BSKE")
    gate = take("value_gate_BTKE")
    if queries and gate is not None:
        v, gate = v * gate, None
    output_gate = take("output_gate_BTHE", low)
    return Case(q, k, v, gate, output_gate, factors, shape.spec, shape.k, shape.impl)


def shape_of_capture(captured: dict[str, Any]) -> dict[str, int]:
    """heads, kv_heads, head_dim, index_heads, index_dim of captured tensors."""
    return {
        "heads": captured["q_BTHE"].shape[2],
        "kv_heads": captured["k_BSKE"].shape[2],
        "head_dim": captured["q_BTHE"].shape[3],
        "index_heads": captured["index_q_BTJI"].shape[2],
        "index_dim": captured["index_q_BTJI"].shape[3],
    }
