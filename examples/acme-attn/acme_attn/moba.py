"""Mixture of Block Attention (Lu et al. 2025, arXiv 2502.13189).

Keys lie in blocks of C. Query t of head h scores every earlier block by its mean key,
s_j = q[t, h] . mean(k[jC .. jC + C - 1]), and attends causally to its own block and to the k - 1
earlier blocks with the highest scores (Eq. 2 to 6 of the paper). There is nothing to train: the
choice follows the attention's own queries and keys, and the hard top-k passes no gradient.

Legend: B batch, T query positions, S key positions, H query heads, K key-value heads, G = H / K,
E head width, N blocks, M = k C keys of one query.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gsa_platform.contracts import Attention, AttentionOutput, LayerDims, Sequence

from . import MobaConfig

GATHERED = {"cpu": 1 << 22, "cuda": 1 << 27}  # elements of keys that are held at once


class MobaAttention(Attention):
    """Memory is linear in T: keys and values are gathered for a few rows at a time, and gathered
    again in the backward. Raises ValueError for sizes below 1."""

    def __init__(self, config: MobaConfig, dims: LayerDims) -> None:
        super().__init__()
        for key in ("block_size", "top_k"):
            if getattr(config, key) < 1:
                raise ValueError(f"attention.{key}={getattr(config, key)} must be at least 1")
        self.block_size, self.top_k = config.block_size, config.top_k

    def describe(self, device_type: str) -> str:
        return f"moba: {self.top_k} blocks of {self.block_size} keys per query and head"

    def mean_keys(self, context: int) -> float:
        """Mean keys that a query of a sequence of `context` tokens attends."""
        c = self.block_size
        past = sum(min(t // c, self.top_k - 1) * c for t in range(context))
        own = sum(t % c + 1 for t in range(context))
        return (past + own) / context

    # A loop over rows in Python: tracing it would unroll thousands of steps.
    @torch.compiler.disable
    def forward(
        self,
        q_BTHE: Tensor,
        k_BSKE: Tensor,
        v_BSKE: Tensor,
        selection: object,
        seq: Sequence,
        bias: Tensor | None = None,
        need_mass: bool = False,
    ) -> AttentionOutput:
        batch, queries, heads, width = q_BTHE.shape
        blocks = -(-k_BSKE.shape[1] // self.block_size)
        picked = min(self.top_k - 1, max(blocks - 1, 0))
        mean_BNKE = block_means(k_BSKE.detach(), self.block_size, seq.doc_start_BS)
        per_row = batch * heads * (picked + 1) * self.block_size * width
        rows = max(1, GATHERED.get(q_BTHE.device.type, 1 << 22) // per_row)
        out = []
        for low in range(0, queries, rows):
            q = q_BTHE[:, low : low + rows]
            start = seq.q_start + low
            index = self.route(q.detach(), mean_BNKE, start, picked, seq.doc_start_BS)
            args = (q, k_BSKE, v_BSKE, index, start, seq.doc_start_BS)
            if torch.is_grad_enabled():
                out.append(checkpoint(self.attend, *args, use_reentrant=False))
            else:
                out.append(self.attend(*args))
        return AttentionOutput(torch.cat(out, 1))

    def route(
        self,
        q_BTHE: Tensor,
        mean_BNKE: Tensor,
        start: int,
        picked: int,
        doc_start_BS: Tensor | None,
    ) -> Tensor:
        """[B, T, H, picked + 1] block numbers, the own block last; -1 where there is none."""
        batch, rows, heads, _ = q_BTHE.shape
        c, n = self.block_size, mean_BNKE.shape[1]
        position = torch.arange(start, start + rows, device=q_BTHE.device)
        own = (position // c).view(1, rows, 1, 1).expand(batch, rows, heads, 1)
        if picked == 0:
            return own
        grouped = q_BTHE.unflatten(2, (mean_BNKE.shape[2], -1))
        score = torch.einsum("btkge,bnke->btkgn", grouped, mean_BNKE).flatten(2, 3)
        block = torch.arange(n, device=q_BTHE.device)
        ok = (block < (position // c)[:, None])[None]
        if doc_start_BS is not None:  # the block's last key is of the query's document
            first = doc_start_BS[:, start : start + rows, None]
            ok = ok & ((block + 1) * c > first)
        score = score.masked_fill(~ok[:, :, None], -torch.inf)
        best = score.topk(picked, -1)
        return torch.cat([best.indices.masked_fill(best.values == -torch.inf, -1), own], -1)

    def attend(
        self,
        q_BTHE: Tensor,
        k_BSKE: Tensor,
        v_BSKE: Tensor,
        block_BTHN: Tensor,
        start: int,
        doc_start_BS: Tensor | None,
    ) -> Tensor:
        """Softmax attention of a few rows over the keys of their blocks."""
        batch, rows, heads, width = q_BTHE.shape
        keys, kv_heads, c = k_BSKE.shape[1], k_BSKE.shape[2], self.block_size
        device = q_BTHE.device
        key = block_BTHN[..., None] * c + torch.arange(c, device=device)
        position = torch.arange(start, start + rows, device=device).view(1, rows, 1, 1, 1)
        seen = (block_BTHN[..., None] >= 0) & (key <= position)
        if doc_start_BS is not None:
            seen = seen & (key >= doc_start_BS[:, start : start + rows, None, None, None])
        seen_BTHM, key_BTHM = seen.flatten(-2), key.flatten(-2).clamp(0, keys - 1)
        # Row of (batch, key, kv head) in the flattened keys.
        first = torch.arange(batch, device=device).view(-1, 1, 1, 1) * keys
        head = torch.arange(heads, device=device).view(1, 1, -1, 1) // (heads // kv_heads)
        row = ((first + key_BTHM) * kv_heads + head).flatten()
        shape = (*key_BTHM.shape, width)
        k_BTHME = k_BSKE.reshape(-1, width).index_select(0, row).view(shape)
        v_BTHME = v_BSKE.reshape(-1, width).index_select(0, row).view(shape)
        logits = (k_BTHME @ q_BTHE[..., None]).squeeze(-1) * width**-0.5
        weight = logits.float() if logits.dtype != torch.float64 else logits
        weight = weight.masked_fill(~seen_BTHM, -torch.inf).softmax(-1).to(v_BTHME.dtype)
        return (weight[..., None, :] @ v_BTHME).squeeze(-2)


def block_means(k_BSKE: Tensor, block: int, doc_start_BS: Tensor | None) -> Tensor:
    """Mean key of each block, [B, N, K, E]; of a block that two documents share, the mean over
    the later one's keys, since only its queries can come after the block."""
    keys = k_BSKE.shape[1]
    n = -(-keys // block)
    k = torch.nn.functional.pad(k_BSKE, (0, 0, 0, 0, 0, n * block - keys))
    k = k.unflatten(1, (n, block))
    if doc_start_BS is None:
        return k.mean(2)  # the last, unfinished block is never an earlier one
    last = torch.arange(n, device=k.device) * block + block - 1
    first = doc_start_BS[:, last.clamp_max(keys - 1)]
    position = torch.arange(n * block, device=k.device).view(n, block)
    keep = (position >= first[..., None])[..., None, None].to(k.dtype)
    return (k * keep).sum(2) / keep.sum(2).clamp_min(1)
