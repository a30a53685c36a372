"""Causal attention to the most recent keys, and to the first of the document (sinks).

Windows: Longformer (arXiv 2004.05150), Mistral 7B (arXiv 2310.06825). Sinks: StreamingLLM
(arXiv 2309.17453).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gsa_platform.contracts import Attention, AttentionOutput, LayerDims, Sequence
from gsa_platform.model.flops import mean_keys

from ..configs import SlidingWindowConfig
from . import sdpa, varlen
from .documents import pack
from .probes import probe_window

IMPLEMENTATIONS = ("auto", "chunked", "flash")
_ROWS = 512  # most query rows of a chunk; a chunk of R rows reads at most window + 2 R keys


class SlidingWindowAttention(Attention):
    """Query t attends keys t - window + 1 .. t and the first `sinks` keys of its document.

    Memory is linear in T, and so is the cost, at `window` keys a query. impl chunked is PyTorch
    SDPA on a chunk of queries and its keys; flash is one varlen flash call (CUDA, half precision,
    no sinks). Raises ValueError for settings that do not exist or do not go together.
    """

    def __init__(self, config: SlidingWindowConfig, dims: LayerDims) -> None:
        super().__init__()
        if config.window < 1 or config.sinks < 0:
            raise ValueError(
                f"attention.window={config.window} must be at least 1 and "
                f"attention.sinks={config.sinks} at least 0"
            )
        if config.impl not in IMPLEMENTATIONS:
            choices = ", ".join(IMPLEMENTATIONS)
            raise ValueError(f"attention.impl={config.impl!r} is not one of {choices}")
        if config.impl == "flash" and config.sinks:
            raise ValueError("attention.impl=flash knows no sinks: choose chunked, or sinks=0")
        self.window, self.sinks, self.impl = config.window, config.sinks, config.impl

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
        usable = varlen.usable(q_BTHE) and varlen.windows()
        if self.impl == "flash" and not usable:
            raise ValueError(
                "attention.impl=flash needs CUDA, bfloat16 or float16, heads of a multiple of 8 "
                "up to 256, and a PyTorch whose varlen attention has windows; choose chunked"
            )
        if self.impl == "chunked" or self.sinks or not usable:
            out = chunked(q_BTHE, k_BSKE, v_BSKE, seq, self.window, self.sinks)
        else:
            out = flash(q_BTHE, k_BSKE, v_BSKE, seq, self.window)
        return AttentionOutput(out)

    def describe(self, device_type: str) -> str:
        impl = f"impl {self.impl}"
        if self.impl == "auto":
            both = device_type == "cuda" and varlen.windows() and not self.sinks
            impl += " (flash in half precision, else chunked)" if both else " (chunked)"
        return f"sliding_window: window {self.window}, sinks {self.sinks}; {impl}"

    def mean_keys(self, context: int) -> float:
        return mean_keys(context, self.window + self.sinks)

    def probe(
        self, q_BTHE: Tensor, k_BSKE: Tensor, selection: Any, seq: Sequence
    ) -> dict[str, Tensor]:
        return probe_window(q_BTHE, k_BSKE, seq, self.window, self.sinks)


def flash(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, seq: Sequence, window: int) -> Tensor:
    """out_BTHE by one varlen call."""
    queries = q_BTHE.shape[1]
    near = slice(max(0, seq.q_start - window + 1), seq.q_start + queries)
    docs = seq.doc_start_BS
    if docs is not None:
        docs = (docs[:, near] - near.start).clamp_min(0)
    seq = Sequence(seq.q_start - near.start, docs)
    packed = pack(q_BTHE, k_BSKE[:, near], v_BSKE[:, near], seq)
    return varlen.attend(packed, window).unflatten(0, q_BTHE.shape[:2])


class _Chunk(NamedTuple):
    """Queries low .. high-1 (absolute) and the keys from key_low on that they may see."""

    low: int
    high: int
    key_low: int


@torch.compiler.disable
def chunked(
    q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, seq: Sequence, window: int, sinks: int
) -> Tensor:
    """out_BTHE, a chunk of queries at a time under an explicit mask of that chunk."""
    queries = q_BTHE.shape[1]
    rows = min(max(window, 64), _ROWS)
    found = list(_chunks(seq.q_start, queries, window, rows))
    base, stop = found[0].key_low, seq.q_start + queries
    # Pieces of `rows` keys, split once: the gradient of a slice is as large as all keys.
    pieces = [x[:, base:stop].split(rows, 1) for x in (k_BSKE, v_BSKE)]
    far = [_sink_keys(x, found, seq, sinks) for x in (k_BSKE, v_BSKE)]
    masks: dict[tuple[int, ...], Tensor] = {}
    out = []
    for i, (chunk, q) in enumerate(zip(found, q_BTHE.split([c.high - c.low for c in found], 1))):
        part = slice((chunk.key_low - base) // rows, (chunk.high - 1 - base) // rows + 1)
        k, v = (torch.cat([f[i], *x[part]], 1) for f, x in zip(far, pieces, strict=True))
        shape = (chunk.high - chunk.low, chunk.low - chunk.key_low, k.shape[1])
        mask = masks.get(shape)
        if mask is None:
            mask = _mask(chunk, seq, window, sinks, far[0][i].shape[1], q.device)
            if seq.doc_start_BS is None and chunk.key_low >= sinks:
                masks[shape] = mask  # it depends on distances alone
        out.append(sdpa.call(q, k, v, attn_mask=mask))
    return torch.cat(out, 1)


def _chunks(q_start: int, queries: int, window: int, rows: int) -> Iterator[_Chunk]:
    """Chunks and the keys of each begin at multiples of `rows`."""
    for first in range(q_start // rows * rows, q_start + queries, rows):
        low, high = max(q_start, first), min(q_start + queries, first + rows)
        yield _Chunk(low, high, max(0, low - window + 1) // rows * rows)


def _sink_keys(
    x_BSKE: Tensor, chunks: list[_Chunk], seq: Sequence, sinks: int
) -> list[Tensor] | tuple[Tensor, ...]:
    """For each chunk the sinks of its first query's document, gathered at once.

    Later documents of a chunk begin inside its own keys. Without documents only the sinks that lie
    before the chunk's keys; with documents all, those that do not are masked.
    """
    if seq.doc_start_BS is None:
        first = x_BSKE[:, :sinks]
        return [first[:, : min(sinks, chunk.key_low)] for chunk in chunks]
    position = _sink_positions(chunks, seq, sinks).flatten(1)
    index = position[..., None, None].expand(-1, -1, *x_BSKE.shape[2:])
    return x_BSKE.gather(1, index).split(sinks, 1) if sinks else [x_BSKE[:, :0]] * len(chunks)


def _sink_positions(chunks: list[_Chunk], seq: Sequence, sinks: int) -> Tensor:
    """[B, chunks, sinks] positions of the first keys of each chunk's first document."""
    assert seq.doc_start_BS is not None
    start = seq.doc_start_BS[:, [chunk.low for chunk in chunks]]
    position = start[..., None] + torch.arange(sinks, device=start.device)
    return position.clamp_max(chunks[-1].high - 1)


def _mask(
    chunk: _Chunk, seq: Sequence, window: int, sinks: int, n_far: int, device: torch.device
) -> Tensor:
    """[rows, keys] or [B, 1, rows, keys] bool over the chunk's far sinks, then its own keys."""
    position = torch.arange(chunk.low, chunk.high, device=device)[:, None]
    key = torch.arange(chunk.key_low, chunk.high, device=device)
    near = (key <= position) & (key > position - window)
    if seq.doc_start_BS is None:
        near |= (key <= position) & (key < sinks)
        return torch.cat([near.new_ones(len(position), n_far), near], 1)
    start = seq.doc_start_BS[:, chunk.low : chunk.high, None]
    near = (near | ((key <= position) & (key < start + sinks))) & (key >= start)
    far = _sink_positions([chunk], seq, sinks)
    far = (far < chunk.key_low) & (far >= start) & (far < start + sinks)
    return torch.cat([far, near], 2)[:, None]
