"""Lightning scores as factors: the T x S score matrix is never held, only its factors.

    score[t, s] = sum_j w[t, j] * act(q[t, j] . k[s] * scale + b[j])

act is the sigmoid (gated lightning indexer, arXiv 2601.15305) or ReLU (DeepSeek-V3.2). One key
vector per position serves the J index heads. With several selection heads (one choice per
key-value head) the J heads are split evenly among them.

Legend: B batch, T queries, S keys, J index heads, I index width, H selection heads, C block.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gsa_kernels.dispatch import triton_reason
from gsa_kernels.selection import Selection, SelectionSpec, TileLayout

from .fp8 import product_dtype
from .keys import own_document, pool_keys, take, wide
from .scores import _CHUNK, BlockScores

ACTIVATIONS = ("sigmoid", "relu")
BLOCK_SCORES = ("mean", "max")


@dataclass(frozen=True)
class IndexFactors(BlockScores):
    """Factors of the scores of queries q_start .. q_start + T - 1 against keys 0 .. S - 1.

    q_BTJI, k_BSI (which may be FP8: see fp8.py), weight_BTJ (already activated), bias_J or
    None. `block_score` says how a block of C keys is scored: from its mean key, or as the largest
    score of its keys.
    Raises ValueError for an unknown activation or block_score, and heads that do not divide J.
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
    def n_queries(self) -> int:
        return self.q_BTJI.shape[1]

    @property
    def bound(self) -> float:
        """Largest possible score of a selection head for weights in (0, 1); inf for ReLU."""
        per_head = self.q_BTJI.shape[2] // self.heads
        return float(per_head) if self.activation == "sigmoid" else float("inf")

    @property
    def keys_BSI(self) -> Tensor:
        """k_BSI in a type that PyTorch computes with: FP8 keys in that of the queries."""
        return self.k_BSI.to(product_dtype(self.q_BTJI, self.k_BSI))

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
        with torch.autocast(k_BSI.device.type, enabled=False):
            q = (wide(self.q_BTJI) * self.scale).reshape(batch, rows * heads, width)
            logits = q @ wide(k_BSI).transpose(1, 2)
            return self._combine(logits.view(batch, rows, heads, -1))

    def gathered(self, k_BHTNI: Tensor) -> Tensor:
        """[B, H, T, N] scores of each query against its own N keys."""
        batch, rows, heads, width = self.q_BTJI.shape
        groups = k_BHTNI.shape[1]
        with torch.autocast(k_BHTNI.device.type, enabled=False):
            q = wide(self.q_BTJI) * self.scale
            q = q.view(batch, rows, groups, heads // groups, width).transpose(1, 2)
            logits = q @ wide(k_BHTNI).transpose(-1, -2)  # [B, H, T, J/H, N]
            return self._combine(logits.transpose(1, 2).reshape(batch, rows, heads, -1))

    @torch.no_grad()
    def saturated(self, sample: int = 256) -> Tensor | None:
        """Share of the causal logits (what the sigmoid takes) outside -8 .. 8, where keys begin to
        tie, of `sample` queries and keys each at even distances; None for ReLU scores."""
        if self.activation != "sigmoid":
            return None
        total, device = self.k_BSI.shape[1], self.k_BSI.device
        row = torch.arange(0, self.n_queries, -(-self.n_queries // sample), device=device)
        key = torch.arange(0, total, -(-total // sample), device=device)
        with torch.autocast(device.type, enabled=False):
            q, k = self.q_BTJI[:, row].float() * self.scale, self.k_BSI[:, key].float()
            logits = torch.einsum("btji,bsi->bjts", q, k)
            if self.bias_J is not None:
                logits = logits + self.bias_J.float()[:, None, None]
        seen = key <= row[:, None] + self.q_start
        return ((logits.abs() > 8) & seen).sum() / (seen.sum() * logits[:, :, 0, 0].numel())

    def _combine(self, logits_BTJN: Tensor) -> Tensor:
        if self.bias_J is not None:
            logits_BTJN = logits_BTJN + self.bias_J[:, None]
        if self.activation == "sigmoid":
            active = torch.sigmoid(logits_BTJN)
        else:
            active = torch.relu(logits_BTJN)
        batch, rows, heads, keys = active.shape
        split = (batch, rows, self.heads, heads // self.heads)
        weight = self.weight_BTJ.reshape(*split[:3], 1, split[3])
        mixed = weight.to(active.dtype) @ active.view(*split, keys)
        return mixed.squeeze(-2).transpose(1, 2)

    def _from_mean(self, block: int) -> bool:
        return block == 1 or self.block_score == "mean"

    def elements(self, block: int) -> int:
        return self.q_BTJI.shape[2] * (1 if self._from_mean(block) else block)

    def _scored_keys(self, block: int, doc_start_BS: Tensor | None) -> Tensor:
        mean = self._from_mean(block)
        return pool_keys(self.keys_BSI, block, doc_start_BS) if mean else self.keys_BSI

    def prepare(self, block: int, doc_start_BS: Tensor | None) -> Any:
        """(what is scored: block means or single keys, documents)."""
        return self._scored_keys(block, doc_start_BS), doc_start_BS

    def tile_scores(
        self, layout: TileLayout, tiles: slice, n_blocks: int, prepared: Any
    ) -> Tensor:
        keys, docs = prepared
        block = layout.spec.key_block
        at = self.rows(layout.anchor_Q[tiles] - self.q_start)
        if self._from_mean(block):
            return at.tile(keys[:, :n_blocks])
        scores = at.tile(keys[:, : n_blocks * block]).unflatten(-1, (n_blocks, block))
        keep = own_document(block, n_blocks, docs, scores.device)
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None, None], -torch.inf)
        return scores.amax(-1)

    def no_kernel(self, block: int, device: torch.device | None = None) -> str:
        """Why blocks of `block` keys cannot be scored by `listed`; empty where they can. device:
        where, if not where the keys are."""
        from .hierarchical import HierarchicalFactors

        if type(self) not in (IndexFactors, HierarchicalFactors):
            return f"{type(self).__name__} has a formula of its own"
        if not self._from_mean(block):
            return "there is no kernel for the largest score of a block's keys"
        if torch.float64 in (self.q_BTJI.dtype, self.k_BSI.dtype, self.weight_BTJ.dtype):
            return "the kernels compute in float32 at most"
        if self.q_BTJI.shape[2] > 64 * self.heads or self.q_BTJI.shape[3] > 128:
            return "the kernels take up to 64 index heads per selection, of 128 channels"
        if torch.are_deterministic_algorithms_enabled():
            return "the gradient of the keys is added up atomically"
        return triton_reason(device or self.k_BSI.device)

    def listed(
        self,
        blocks_BHQN: Tensor,
        spec: SelectionSpec,
        doc_start_BS: Tensor | None,
        tiles_Q: Tensor | None = None,
    ) -> Tensor:
        """[B, H, Q, N] float32 scores of the blocks listed, by a kernel; -inf where negative.

        Line i of the lists belongs to query tile i, or tiles_Q[i] where those are given. N and the
        number of whole blocks are at least 1.
        """
        from . import at_ops

        single = spec.key_block == 1  # the kernel reads FP8, and only the keys listed
        keys = self.k_BSI if single else self._scored_keys(spec.key_block, doc_start_BS)
        return at_ops.listed_scores(
            self.q_BTJI.contiguous(),
            keys.contiguous(),
            self.weight_BTJ.contiguous(),
            self.bias_J,
            blocks_BHQN.contiguous(),
            tiles_Q,
            spec.query_tile,
            self.scale,
            self.activation == "sigmoid",
            self.q_start if single else -1,
        )

    def at(self, selection: Selection) -> Tensor:
        """[B, H, Q, N] scores of the selected blocks; -inf in empty slots.

        One kernel where there is one (`no_kernel`). Otherwise streamed over tiles and recomputed
        in the backward, so memory stays linear in T.
        """
        c, docs, blocks = selection.spec.key_block, selection.doc_start_BS, selection.blocks_BHQN
        mean = self._from_mean(c)
        batch, groups, tiles, slots = blocks.shape
        if slots == 0 or self.k_BSI.shape[1] < c:
            return self.weight_BTJ.new_zeros(batch, groups, tiles, slots)
        if not self.no_kernel(c):
            return self.listed(blocks, selection.spec, docs)
        keys = self._scored_keys(c, docs)
        # Gathering anchors first keeps each checkpointed piece small.
        at_anchor = self.rows(selection.layout.anchor_Q - self.q_start)
        per_tile = max(1, batch * groups * slots * (1 if mean else c) * keys.shape[-1])
        step = max(1, 4 * _CHUNK[keys.device.type] // per_tile)

        def piece(q: Tensor, w: Tensor, k: Tensor, lo: int, hi: int) -> Tensor:
            index = blocks[:, :, lo:hi].long().clamp_min(0)
            part = replace(at_anchor, q_BTJI=q, weight_BTJ=w)
            if mean:
                return part.gathered(take(k, index))
            key = (index[..., None] * c + torch.arange(c, device=k.device)).flatten(-2)
            score = part.gathered(take(k, key)).unflatten(-1, (slots, c))
            if docs is not None:
                last = torch.gather(
                    docs[:, None, None].expand(*index.shape[:3], -1), -1, index * c + c - 1
                )
                late = key.unflatten(-1, (slots, c)) < last[..., None]
                score = score.masked_fill(late, -torch.inf)
            return score.amax(-1)

        pieces = []
        for lo in range(0, tiles, step):
            hi = min(tiles, lo + step)
            args = (at_anchor.q_BTJI[:, lo:hi], at_anchor.weight_BTJ[:, lo:hi], keys)
            pieces.append(checkpoint(piece, *args, lo, hi, use_reentrant=False))
        return torch.cat(pieces, 2).masked_fill(blocks < 0, -torch.inf)
