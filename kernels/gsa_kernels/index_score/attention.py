"""The oracle's scores: attention probability of each block at the tile's anchor query.

It reads q and k of the very attention whose keys it chooses, which no indexer can afford: a
control that shows what a perfect score would cover. Costs dense attention of one query per tile.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gsa_kernels.selection import TileLayout

from .scores import BlockScores


@dataclass(frozen=True)
class AttentionScores(BlockScores):
    """q_BTHE and all keys k_BSKE so far, as the attention uses them; k_BSI is [B, S, 0].

    A score is the block's share of the softmax over all causal keys of the anchor's document,
    averaged over the heads that share the selection.
    """

    k_BSI: Tensor
    q_BTHE: Tensor
    k_BSKE: Tensor
    heads: int = 1
    q_start: int = 0

    @property
    def n_queries(self) -> int:
        return self.q_BTHE.shape[1]

    @property
    def bound(self) -> float:
        return 1.0

    def with_keys(self, k_BSI: Tensor) -> "AttentionScores":
        return replace(self, k_BSI=k_BSI)

    def elements(self, block: int) -> int:
        return self.q_BTHE.shape[2] * block

    def tile_scores(
        self, layout: TileLayout, tiles: slice, n_blocks: int, prepared: Tensor | None
    ) -> Tensor:
        c = layout.spec.key_block
        anchors = layout.anchor_Q[tiles]
        end = int(anchors[-1]) + 1
        batch, _, heads, width = self.q_BTHE.shape
        kv_heads = self.k_BSKE.shape[2]
        dtype = torch.float64 if self.q_BTHE.dtype == torch.float64 else torch.float32
        q = self.q_BTHE[:, anchors - self.q_start].to(dtype) * width**-0.5
        q = q.view(batch, -1, kv_heads, heads // kv_heads, width).permute(0, 2, 3, 1, 4)
        k = self.k_BSKE[:, :end].to(dtype).permute(0, 2, 3, 1)[:, :, None]
        with torch.autocast(q.device.type, enabled=False):
            logits = q @ k
        key = torch.arange(end, device=q.device)
        keep = (key <= anchors[:, None])[None]
        if prepared is not None:
            keep = keep & (key >= prepared[:, anchors, None])
        p = logits.masked_fill_(~keep[:, None, None], -torch.inf).softmax(-1)
        p = p.mean(2) if self.heads > 1 else p.mean((1, 2))[:, None]
        return p[..., : n_blocks * c].unflatten(-1, (n_blocks, c)).sum(-1)
