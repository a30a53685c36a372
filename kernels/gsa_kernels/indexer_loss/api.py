"""Training signals of an indexer. Hard top-k gives it no gradient of its own.

KL (DeepSeek-V3.2): KL(p || s), p the attention probability summed over heads (and over the
queries of a tile, and the keys of a block), s the distribution of the index scores at the tile's
anchor, both over the candidates of the tile. `selected_kl` takes the candidates that were
selected; `dense_kl` takes every candidate, for a few query tiles, at a cost linear in T.

distribution "softmax": s = softmax(score). "log": s = score / sum(score), the softmax of
log(score), which lets bounded sigmoid scores become as sharp as attention is.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gsa_kernels.attention_mass import dense_mass, dense_masses, no_kernel
from gsa_kernels.dispatch import triton_reason
from gsa_kernels.index_score.api import _CHUNK, BlockScores, IndexFactors, scores_at
from gsa_kernels.selection import Selection, SelectionSpec, tile_layout

DISTRIBUTIONS = ("softmax", "log")
_EPS = 1e-6  # below any score that carries a signal; keeps log(score) finite for ReLU zeros


def choose(factors: BlockScores, spec: SelectionSpec, device: torch.device) -> tuple[str, str]:
    """(implementation, reason) of the scores that the signals read, and of their gradients.

    factors may be meta tensors; device: where the real ones are.
    """
    reason = triton_reason(device)
    if not reason and not isinstance(factors, IndexFactors):
        reason = f"{type(factors).__name__} has a formula of its own"
    elif not reason:
        assert isinstance(factors, IndexFactors)
        reason = factors.no_kernel(spec.key_block, device)
    return ("eager", f"PyTorch, because {reason}") if reason else ("triton", "the fastest here")


def log_score_bias(
    factors: BlockScores, selection: Selection, beta: float, previous: Tensor | None = None
) -> Tensor:
    """[B, H, Q, N] beta * log(score), to be added to the attention logits; 0 in empty slots.

    Sigmoid scores are divided by their bound first, so the bias is never positive. previous: the
    bias of the last call, needed when decoding goes on inside a tile, whose anchor has passed.
    """
    r, blocks = selection.spec.query_tile, selection.blocks_BHQN
    if selection.q_start % r:
        if previous is None:
            raise ValueError(f"queries start inside a tile of {r}: its previous bias is needed")
        kept = previous[:, :, -1:]
        kept = torch.nn.functional.pad(kept, (0, blocks.shape[-1] - kept.shape[-1]))
        start = -(-selection.q_start // r) * r
        left = selection.q_start + selection.n_queries - start
        if left <= 0:
            return kept
        rest = Selection(
            selection.spec, blocks[:, :, 1:], left, selection.n_keys, start, selection.doc_start_BS
        )
        return torch.cat([kept, log_score_bias(factors, rest, beta)], 2)
    scores = scores_at(factors, selection)
    empty = selection.blocks_BHQN < 0
    scale = factors.bound if factors.bound != float("inf") else 1.0
    # The inner fill keeps -inf out of the logarithm and so NaN out of its gradient.
    # ReLU scores with signed head weights may fall below 0, which counts as 0.
    share = scores.masked_fill(empty, scale).clamp_min(0) / scale
    return (beta * (share + _EPS).log()).masked_fill(empty, 0)


def selected_kl(
    factors: BlockScores, selection: Selection, mass_BHQN: Tensor, distribution: str = "softmax"
) -> Tensor:
    """Mean KL over the tiles that selected at least two blocks; a scalar, 0 if there are none.

    mass_BHQN is AttentionResult.mass_BHQN of the attention over this selection.
    """
    _check(distribution)
    scores = scores_at(factors, selection)
    if scores.numel() and scores.dtype != torch.float64 and not triton_reason(scores.device):
        return _kernel_kl(scores, mass_BHQN, distribution)
    return _mean_kl(scores, mass_BHQN, selection.blocks_BHQN >= 0, distribution)


def dense_kl(
    factors: BlockScores,
    q_BTHE: Tensor,
    k_BSKE: Tensor,
    spec: SelectionSpec,
    tiles: Tensor,
    doc_start_BS: Tensor | None = None,
    distribution: str = "softmax",
) -> Tensor:
    """Mean KL of the query tiles `tiles` (their numbers) over every candidate block; a scalar.

    The target is the full softmax attention of q over all keys, recomputed here, no gradient.
    For IndexFactors on a GPU nothing waits for the device. Raises ValueError for an unknown
    distribution.
    """
    _check(distribution)
    whole = factors.q_start % spec.query_tile == 0
    if whole and isinstance(factors, IndexFactors) and not no_kernel(q_BTHE):
        tiles = tiles.to(q_BTHE.device, non_blocking=True)
        return _all_tiles(factors, q_BTHE, k_BSKE, spec, tiles, doc_start_BS, distribution)
    layout = tile_layout(
        spec, q_BTHE.shape[1], k_BSKE.shape[1], factors.q_start, doc_start_BS, q_BTHE.device
    )
    c = spec.key_block
    prepared = factors.prepare(c, doc_start_BS)
    total = torch.zeros((), device=factors.k_BSI.device)
    weight = total
    for tile in tiles.tolist():
        n_blocks = max(0, layout.anchor(tile) - spec.window + 1) // c
        if n_blocks < 2:
            continue
        part = slice(tile, tile + 1)
        mass = dense_mass(q_BTHE, k_BSKE, layout, tile, doc_start_BS, factors.heads)
        allowed = layout.candidates(part, n_blocks)[:, None]
        scores = checkpoint(
            factors.tile_scores, layout, part, n_blocks, prepared, use_reentrant=False
        )
        mass = mass[..., :n_blocks].unsqueeze(2)
        rows = (allowed.sum(-1) >= 2).expand(scores.shape[:3])
        loss = _kl(scores, mass, allowed.expand_as(scores), distribution)
        total = total + loss.masked_fill(~rows, 0).sum()
        weight = weight + rows.sum()
    return total / weight.clamp_min(1)


def _all_tiles(
    factors: IndexFactors,
    q: Tensor,
    k: Tensor,
    spec: SelectionSpec,
    tiles: Tensor,
    docs: Tensor | None,
    distribution: str,
) -> Tensor:
    """dense_kl of all tiles at once: lists of every candidate, scored as a selection would be."""
    from . import ops

    c, r, start = spec.key_block, spec.query_tile, factors.q_start
    batch, keys, heads = q.shape[0], k.shape[1], factors.heads
    if docs is not None:
        docs = docs.contiguous()
    if keys < c or tiles.numel() == 0:
        return q.new_zeros((), dtype=torch.float32)
    sizes = [c, r, spec.window, spec.sinks, start, heads]
    blocks = ops.candidate_blocks(tiles, docs, batch, keys, sizes)
    mass = dense_masses(q, k, spec, tiles, start, docs, heads)[..., : keys // c]
    if not factors.no_kernel(c):
        scores = factors.listed(blocks, spec, docs, tiles)
    else:
        scores = _streamed(factors, k, spec, tiles, docs).masked_fill(blocks < 0, -torch.inf)
    return _kernel_kl(scores, mass, distribution)


def _streamed(
    factors: IndexFactors, k: Tensor, spec: SelectionSpec, tiles: Tensor, docs: Tensor | None
) -> Tensor:
    """[B, H, n, keys // C] scores of a few tiles, recomputed in the backward."""
    c, keys = spec.key_block, k.shape[1]
    every = tile_layout(spec, factors.n_queries, keys, factors.q_start, docs, k.device)
    layout = replace(
        every,
        anchor_Q=every.anchor_Q[tiles],
        local_BQ=every.local_BQ[:, tiles],
        sink_lo_BQ=every.sink_lo_BQ[:, tiles],
        sink_hi_BQ=every.sink_hi_BQ[:, tiles],
    )
    prepared = factors.prepare(c, docs)
    held = k.shape[0] * factors.elements(c) * (keys // c)
    step = max(1, _CHUNK[k.device.type] // held)
    pieces = []
    for low in range(0, tiles.numel(), step):
        part = slice(low, low + step)
        args = (layout, part, keys // c, prepared)
        pieces.append(checkpoint(factors.tile_scores, *args, use_reentrant=False))
    return torch.cat(pieces, 2)


def _kernel_kl(scores: Tensor, mass: Tensor, distribution: str) -> Tensor:
    """Mean KL over the rows with two or more scores above -inf."""
    from . import ops

    scores, mass = scores.float().contiguous(), mass.float().contiguous()
    loss: Tensor = ops.mean_kl(scores, mass, distribution == "log", _EPS)[0]
    return loss


def _mean_kl(scores: Tensor, mass: Tensor, allowed: Tensor, distribution: str) -> Tensor:
    rows = allowed.sum(-1) >= 2
    loss = _kl(scores, mass, allowed, distribution).masked_fill(~rows, 0)
    return loss.sum() / rows.sum().clamp_min(1)


def _check(distribution: str) -> None:
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution {distribution!r} is not one of {DISTRIBUTIONS}")


def _kl(scores: Tensor, mass: Tensor, allowed: Tensor, distribution: str) -> Tensor:
    """[...] KL(mass / sum(mass) || distribution of scores) over the allowed columns."""
    if scores.shape[-1] == 0:
        return scores.new_zeros(scores.shape[:-1])
    scores = scores.float() if scores.dtype != torch.float64 else scores
    logits = scores.masked_fill(~allowed, 0)
    if distribution == "log":
        logits = (logits.clamp_min(0) + _EPS).log()
    # A large finite value: rows without any column must give 0, not NaN, in the gradient.
    log_s = logits.masked_fill(~allowed, -1e30).log_softmax(-1)
    target = mass.to(scores.dtype).masked_fill(~allowed, 0)
    target = target / target.sum(-1, keepdim=True).clamp_min(1e-30)
    terms = torch.xlogy(target, target) - target * log_s.masked_fill(~allowed, 0)
    return terms.sum(-1)
