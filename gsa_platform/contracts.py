"""What each slot promises: the interfaces between the host model and its components.

A component is a torch module built as `Class(config, dims)`: config is its own dataclass, dims a
LayerDims. The host layer (model/attention_layer.py) calls them in this order:

    gate(x)                                  -> GateValues, applied to v and to the output
    indexer(x, seq, spec)                    -> factors of the index scores, opaque to the host
    indexer.select(factors, spec, ...)       -> Choice(selection, statistics)
    objective.bias(factors, selection, ...)  -> logit bias or None
    attention(q, k, v, selection, seq, ...)  -> AttentionOutput
    objective.loss(...)                      -> the indexer's loss or None
    sparsity.loss(...)                       -> the controller's own loss or None

Legend: B batch, T query positions, S key positions, D model width, H query heads, K key-value
heads, E head width. During training T = S; when decoding, T is what is new.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class LayerDims:
    """Sizes of the layer a component is built for."""

    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    context: int  # tokens of the longest training sequence
    layer: int = 0
    n_layers: int = 1
    rope_theta: float = 500000.0


@dataclass(frozen=True)
class Sequence:
    """What a component may know of the tokens of one call besides their hidden states."""

    q_start: int = 0  # absolute position of the first query; keys start at 0
    doc_start_BS: Tensor | None = None  # first position of each key's document; None: one document
    step: int = 0  # optimizer steps taken


@dataclass(frozen=True)
class GateValues:
    """Multipliers; None leaves the tensor as it is. The last dimension may be 1 (per head)."""

    value_BTKE: Tensor | None = None
    output_BTHE: Tensor | None = None


@dataclass(frozen=True)
class Choice:
    """A selection (None: nothing is pruned) and the score statistics it was made from."""

    selection: Any
    statistics: dict[str, Tensor]


@dataclass(frozen=True)
class AttentionOutput:
    """out_BTHE; mass: attention on each selected block, when it was asked for."""

    out_BTHE: Tensor
    mass: Tensor | None = None


class Part(nn.Module):
    """What every component is. The host builds it as `Class(config, dims)` and reads nothing of
    it but the methods of its slot; a subclass that needs neither may leave out its __init__."""

    def __init__(self, config: Any = None, dims: Any = None) -> None:
        """dims: a LayerDims."""
        super().__init__()
        self.config, self.dims = config, dims


def undefined(part: object, method: str) -> NotImplementedError:
    """What a component raises for a method that its contract asks of it and it does not have."""
    return NotImplementedError(f"{type(part).__name__} does not define {method}()")


class Attention(Part):
    """Softmax attention, over a selection or over every key."""

    def forward(
        self,
        q_BTHE: Tensor,
        k_BSKE: Tensor,
        v_BSKE: Tensor,
        selection: Any,
        seq: Sequence,
        bias: Tensor | None = None,
        need_mass: bool = False,
    ) -> AttentionOutput:
        """Queries are positions seq.q_start .. seq.q_start + T - 1 of the S keys.

        With selection None every causal key of the query's document is attended. Where its
        Capabilities say fused_gate, the keyword gate carries the output gate, if there is one
        ([B, T, H, E or 1]), and out_BTHE is the output times the gate; otherwise the host
        multiplies.
        """
        raise undefined(self, "forward")

    def selection_spec(self, sparsity: Sparsity) -> Any:
        """Granularity and forced keys for the indexer; only for attentions that take one."""
        raise undefined(self, "selection_spec")

    def describe(self, device_type: str) -> str:
        """One line for the log: which implementation will run on this device, and why."""
        return ""

    def mean_keys(self, context: int) -> float | None:
        """Mean keys a query of a whole sequence attends, where the attention alone decides it;
        None: the selection decides, or every causal key is attended."""
        return None

    def probe(
        self, q_BTHE: Tensor, k_BSKE: Tensor, selection: Any, seq: Sequence
    ) -> dict[str, Tensor]:
        """Observations for the diagnostics from a few query rows, each one-dimensional.

        Per row: position, first_sparse, first_dense, covered; per choice: possible, got, best,
        hits, wanted (see metrics/observer.py). {} if there is nothing to say.
        """
        return {}


class Indexer(Part):
    """Scores keys for queries. Its factors carry `k_BSI`, the index keys, which are cached, and
    `with_keys(k_BSI)`, the same queries against all keys so far. They may have `remember(cache)`,
    the same factors with a place (LayerCache.index_pooled_BMI) for what later steps can use,
    and `saturated()`, the share of the logits beyond what tells keys apart, which validation logs.

    An indexer without parameters works with objective=none only; the host refuses it otherwise.
    """

    needs_attention: bool = False
    straight_through: bool = False  # it rounds, and its gradients are those without rounding

    def forward(self, x_BTD: Tensor, seq: Sequence, spec: Any) -> Any:
        """Factors of the scores of x's positions.

        With `needs_attention`, forward also gets the keywords q_BTHE and k_BSKE: the layer's own
        queries and all its keys so far, rotated and detached.
        """
        raise undefined(self, "forward")

    def select(
        self, factors: Any, spec: Any, sparsity: Sparsity, seq: Sequence, previous: Any = None
    ) -> Choice:
        """previous: the unfinished tile of the last call (decoding), else None."""
        raise undefined(self, "select")

    def describe(self, device_type: str, spec: Any, sparsity: Sparsity) -> str:
        """One line for the log: which implementation will select on this device, and why."""
        return ""

    def flops(self, context: int, spec: Any) -> int:
        """Forward FLOPs per token of projections and scoring, for the run's accounts."""
        return 0


class Sparsity(Part):
    """Turns score statistics into budgets. Budgets count keys, window and sinks included."""

    window: int
    sinks: int
    max_keys: int  # static upper bound of any budget
    statistics: tuple[str, ...] = ()  # what the rule reads; only these (and count) are computed

    def budget(self, seq: Sequence, spec: Any = None) -> Any:
        """An int, or a rule dict[str, Tensor] -> Tensor of budgets (statistics: [B, H, Q, ...]).

        seq.step is the training step (0 when decoding); spec the selection's granularity, in
        whose blocks count and histogram are given; None: single keys.
        """
        raise undefined(self, "budget")

    def observe(self, statistics: dict[str, Tensor]) -> None:
        """Called after the optimizer step with the step's mean statistics (over the tiles that
        had candidates), for running values."""

    def loss(
        self, factors: Any, choice: Choice, q_BTHE: Tensor, k_BSKE: Tensor, seq: Sequence
    ) -> Tensor | None:
        """Scalar to add to the language-model loss (already weighted), or None: for controllers
        with parameters. Called in training only. q and k are detached; factors are not."""
        return None


class Gate(Part):
    def forward(self, x_BTD: Tensor) -> GateValues:
        raise undefined(self, "forward")


class Objective(Part):
    """How the indexer learns."""

    detach_indexer: bool = True  # the indexer reads detached inputs
    need_mass: bool = False  # loss() wants the attention's mass

    def describe(self, device_type: str, spec: Any, indexer: Indexer) -> str:
        """One line for the log: which implementation will run on this device, and why."""
        return ""

    def dense(self, seq: Sequence) -> bool:
        """Whether this step attends densely (a warm-up of the indexer)."""
        return False

    def bias(self, factors: Any, selection: Any, previous: Tensor | None) -> Tensor | None:
        return None

    def loss(
        self,
        factors: Any,
        spec: Any,
        selection: Any,
        mass: Tensor | None,
        q_BTHE: Tensor,
        k_BSKE: Tensor,
        seq: Sequence,
    ) -> Tensor | None:
        """Scalar to add to the language-model loss (already weighted), or None."""
        return None
