"""Index scores as factors: the T x S score matrix is never held, only its factors.

    score[t, s] = sum_j w[t, j] * act(q[t, j] . k[s] * scale + b[j])

act is the sigmoid (gated lightning indexer, arXiv 2601.15305) or ReLU (DeepSeek-V3.2). One key
vector per position serves the J index heads. With several selection heads (one choice per
key-value head) the J heads are split evenly among them.

Legend: B batch, T queries, S keys, J index heads, I index width, H selection heads, C block.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gsa_kernels.selection import Selection

ACTIVATIONS = ("sigmoid", "relu")
BLOCK_SCORES = ("mean", "max")
_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 27}  # score elements held at once


@dataclass(frozen=True)
class IndexFactors:
    """Factors of the scores of queries q_start .. q_start + T - 1 against keys 0 .. S - 1.

    q_BTJI, k_BSI, weight_BTJ (already activated), bias_J or None. `block_score` says how a block
    of C keys is scored: from its mean key, or as the largest score of its keys.
    A subclass may override `tile` for another score function.
    """

    q_BTJI: Tensor
    k_BSI: Tensor
    weight_BTJ: Tensor
    bias_J: Tensor | None = None
    scale: float = 1.0
    activation: str = "sigmoid"
    block_score: str = "mean"
    heads: int = 1
    q_start: int = 0

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {ACTIVATIONS}")
        if self.block_score not in BLOCK_SCORES:
            raise ValueError(f"block_score {self.block_score!r} is not one of {BLOCK_SCORES}")
        if self.q_BTJI.shape[2] % self.heads:
            raise ValueError(
                f"{self.q_BTJI.shape[2]} index heads cannot be split over {self.heads} selections"
            )

    @property
    def bound(self) -> float:
        """Largest possible score of a selection head for weights in (0, 1); inf for ReLU."""
        per_head = self.q_BTJI.shape[2] // self.heads
        return float(per_head) if self.activation == "sigmoid" else float("inf")

    def with_keys(self, k_BSI: Tensor) -> "IndexFactors":
        """The same queries against other keys (a cache, or pooled keys)."""
        return replace(self, k_BSI=k_BSI)

    def rows(self, index: Tensor) -> "IndexFactors":
        """Keep only the queries at `index` (offsets from q_start)."""
        return replace(self, q_BTJI=self.q_BTJI[:, index], weight_BTJ=self.weight_BTJ[:, index])

    def detach(self) -> "IndexFactors":
        return replace(
            self,
            q_BTJI=self.q_BTJI.detach(),
            k_BSI=self.k_BSI.detach(),
            weight_BTJ=self.weight_BTJ.detach(),
            bias_J=None if self.bias_J is None else self.bias_J.detach(),
        )

    def tile(self, k_BSI: Tensor) -> Tensor:
        """[B, H, T, S] scores of the held queries against the keys given (a few rows only)."""
        batch, rows, heads, width = self.q_BTJI.shape
        q = (self.q_BTJI * self.scale).reshape(batch, rows * heads, width)
        logits = q @ k_BSI.transpose(1, 2)
        logits = logits.view(batch, rows, heads, -1)
        return self._combine(logits, self.weight_BTJ[..., None])

    def gathered(self, k_BHTNI: Tensor) -> Tensor:
        """[B, H, T, N] scores of each query against its own N keys."""
        batch, rows, heads, width = self.q_BTJI.shape
        groups = k_BHTNI.shape[1]
        q = (self.q_BTJI * self.scale).view(batch, rows, groups, heads // groups, width)
        q = q.transpose(1, 2)
        logits = q @ k_BHTNI.transpose(-1, -2)  # [B, H, T, J/H, N]
        logits = logits.transpose(1, 2).reshape(batch, rows, heads, -1)
        return self._combine(logits, self.weight_BTJ[..., None])

    def _combine(self, logits_BTJN: Tensor, weight_BTJ1: Tensor) -> Tensor:
        if self.bias_J is not None:
            logits_BTJN = logits_BTJN + self.bias_J[:, None]
        if self.activation == "sigmoid":
            active = torch.sigmoid(logits_BTJN)
        else:
            active = torch.relu(logits_BTJN)
        batch, rows, heads, keys = active.shape
        split = (batch, rows, self.heads, heads // self.heads)
        weight = weight_BTJ1.view(*split[:3], 1, split[3])
        mixed = weight.to(active.dtype) @ active.view(*split, keys)
        return mixed.squeeze(-2).transpose(1, 2)


def pool_keys(k_BSI: Tensor, block: int, doc_start_BS: Tensor | None = None) -> Tensor:
    """Mean key of each whole block, [B, S // block, I].

    A block that holds the end of one document and the start of another is the mean over the
    later document's keys only: queries that can select it belong to that document or a later one.
    """
    batch, keys, width = k_BSI.shape
    n = keys // block
    k = k_BSI[:, : n * block].view(batch, n, block, width)
    if block == 1:
        return k.squeeze(2)
    if doc_start_BS is None:
        return k.mean(2)
    position = torch.arange(n * block, device=k_BSI.device).view(n, block)
    start = doc_start_BS[:, block - 1 : n * block : block]
    keep = (position >= start[..., None]).to(k.dtype)[..., None]
    return (k * keep).sum(2) / keep.sum(2)


def score_tile(
    factors: IndexFactors, block: int, n_blocks: int, doc_start_BS: Tensor | None, pooled: Tensor
) -> Tensor:
    """[B, H, T, n_blocks] block scores of the held queries (few rows) for the first n_blocks.

    `pooled` is pool_keys(...), made once per sequence; used when block_score is "mean".
    """
    if block == 1:
        return factors.tile(factors.k_BSI[:, :n_blocks])
    if factors.block_score == "mean":
        return factors.tile(pooled[:, :n_blocks])
    scores = factors.tile(factors.k_BSI[:, : n_blocks * block])
    scores = scores.unflatten(-1, (n_blocks, block))
    keep = _own_document(block, n_blocks, doc_start_BS, scores.device)
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None], -torch.inf)
    return scores.amax(-1)


def _own_document(
    block: int, n_blocks: int, doc_start_BS: Tensor | None, device: torch.device
) -> Tensor | None:
    """[B, n_blocks, block] bool: keys of the document that a block's last key belongs to."""
    if doc_start_BS is None:
        return None
    position = torch.arange(n_blocks * block, device=device).view(n_blocks, block)
    return position >= doc_start_BS[:, block - 1 : n_blocks * block : block, None]


def scores_at(factors: IndexFactors, selection: Selection) -> Tensor:
    """[B, H, Q, N] scores of the selected blocks, differentiable; -inf in empty slots.

    Streamed over tiles and recomputed in the backward, so memory stays linear in T. A tile whose
    anchor lies before q_start (decoding goes on inside a tile) has no query here: ValueError.
    """
    c, r = selection.spec.key_block, selection.spec.query_tile
    if selection.q_start % r:
        raise ValueError(f"scores need whole tiles: q_start {selection.q_start} is not {r} x n")
    anchors = selection.layout.anchor_Q - factors.q_start
    # Gathering anchors first keeps each checkpointed piece small.
    at_anchor = factors.rows(anchors)
    mean = c == 1 or factors.block_score == "mean"
    docs = selection.doc_start_BS
    keys = pool_keys(factors.k_BSI, c, docs) if mean else factors.k_BSI
    blocks = selection.blocks_BHQN
    batch, groups, tiles, slots = blocks.shape
    if slots == 0 or keys.shape[1] == 0:
        return factors.weight_BTJ.new_zeros(batch, groups, tiles, slots)
    per_tile = max(1, batch * groups * slots * (1 if mean else c) * keys.shape[-1])
    step = max(1, 4 * _CHUNK[keys.device.type] // per_tile)

    def piece(q: Tensor, w: Tensor, k: Tensor, bias: Tensor | None, lo: int, hi: int) -> Tensor:
        index = blocks[:, :, lo:hi].long().clamp_min(0)
        part = replace(at_anchor, q_BTJI=q, weight_BTJ=w, bias_J=bias)
        if mean:
            return part.gathered(_take(k, index))
        key = (index[..., None] * c + torch.arange(c, device=k.device)).flatten(-2)
        score = part.gathered(_take(k, key)).unflatten(-1, (slots, c))
        if docs is not None:
            last = torch.gather(
                docs[:, None, None].expand(*index.shape[:3], -1), -1, index * c + c - 1
            )
            score = score.masked_fill(key.unflatten(-1, (slots, c)) < last[..., None], -torch.inf)
        return score.amax(-1)

    pieces = []
    for lo in range(0, tiles, step):
        hi = min(tiles, lo + step)
        args = (at_anchor.q_BTJI[:, lo:hi], at_anchor.weight_BTJ[:, lo:hi], keys, factors.bias_J)
        pieces.append(checkpoint(piece, *args, lo, hi, use_reentrant=False))
    scores = torch.cat(pieces, 2)
    return scores.masked_fill(blocks < 0, -torch.inf)


def _take(k_BSI: Tensor, index_BHTN: Tensor) -> Tensor:
    """[B, H, T, N, I]: rows of each sequence's keys."""
    batch, keys, width = k_BSI.shape
    offset = torch.arange(batch, device=k_BSI.device).view(-1, 1, 1, 1) * keys
    flat = (index_BHTN + offset).reshape(-1)
    return k_BSI.reshape(batch * keys, width).index_select(0, flat).view(*index_BHTN.shape, width)
