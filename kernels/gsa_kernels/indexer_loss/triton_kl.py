"""KL of each row's scores to its attention mass, with the gradient of the scores, in one pass out.

Legend: B batch, H selection heads, Q query tiles, N slots, C keys per block, R queries per tile.
"""

import triton
import triton.language as tl

from gsa_kernels.index_score.triton_scores import candidate_range


@triton.jit
def logits(s, mass, LOG: tl.constexpr, EPS: tl.constexpr):
    """(logit, target weight) of scores; -inf and 0 in empty slots."""
    there = s != float("-inf")
    z = s
    if LOG:
        z = tl.log(tl.maximum(s, 0.0, propagate_nan=tl.PropagateNan.ALL) + EPS)
    return tl.where(there, z, float("-inf")), tl.where(there, mass, 0.0)


@triton.jit
def kl_kernel(
    score_ptr,  # [B, H, Q, N] float32, -inf in empty slots
    mass_ptr,  # [B, H, Q, N] float32
    loss_ptr,  # [2, B, H, Q] float32: loss, and 1 for each row that counts
    grad_ptr,  # [B, H, Q, N] float32: d loss / d score
    rows,
    N,
    EPS: tl.constexpr,
    LOG: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    row_ok = row < rows
    top = tl.full([BR], float("-inf"), tl.float32)
    norm = tl.zeros([BR], tl.float32)
    total = tl.zeros([BR], tl.float32)
    count = tl.zeros([BR], tl.int32)
    for low in tl.range(0, N, BN, num_stages=1):
        n = low + tl.arange(0, BN)
        ok = row_ok[:, None] & (n < N)[None, :]
        at = row[:, None] * N + n[None, :]
        s = tl.load(score_ptr + at, mask=ok, other=float("-inf"))
        z, weight = logits(s, tl.load(mass_ptr + at, mask=ok, other=0.0), LOG, EPS)
        new = tl.maximum(top, tl.max(z, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        norm = norm * tl.exp(top - safe) + tl.sum(tl.exp(z - safe[:, None]), 1)
        top = new
        total += tl.sum(weight, 1)
        count += tl.sum((s != float("-inf")).to(tl.int32), 1)
    counts = count >= 2
    lse = tl.where(counts, top + tl.log(norm), 0.0)
    inverse = 1.0 / tl.maximum(total, 1e-30)
    share = total * inverse  # 1, or 0 for a row whose candidates got no attention
    loss = tl.zeros([BR], tl.float32)
    for low in tl.range(0, N, BN, num_stages=1):
        n = low + tl.arange(0, BN)
        ok = row_ok[:, None] & (n < N)[None, :]
        at = row[:, None] * N + n[None, :]
        s = tl.load(score_ptr + at, mask=ok, other=float("-inf"))
        z, weight = logits(s, tl.load(mass_ptr + at, mask=ok, other=0.0), LOG, EPS)
        live = (s != float("-inf")) & counts[:, None]
        target = weight * inverse[:, None]
        log_s = z - lse[:, None]
        entropy = tl.where(target > 0, target * tl.log(target), 0.0)
        loss += tl.sum(tl.where(live, entropy - target * log_s, 0.0), 1)
        grad = tl.exp(log_s) * share[:, None] - target
        if LOG:
            # clamp_min lets the gradient pass at the bound, not below it.
            grad = tl.where(s < 0, 0.0, grad / (tl.maximum(s, 0.0) + EPS))
        tl.store(grad_ptr + at, tl.where(live, grad, 0.0), mask=ok)
    tl.store(loss_ptr + row, loss, mask=row_ok)
    tl.store(loss_ptr + rows + row, counts.to(tl.float32), mask=row_ok)


@triton.jit
def candidate_kernel(
    tiles_ptr,  # [n]: tile numbers, counted from the first tile of the queries
    docs_ptr,  # [B, S]
    block_ptr,  # [B, H, n, N] int32: the block's own number, or -1
    S,
    first_tile,
    n,
    N,
    H: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    BN: tl.constexpr,
):
    """Blocks that a tile may choose: TileLayout.candidates for tiles given on the device."""
    line = tl.program_id(0)
    b, i = line // (n * H), line % n
    tile = first_tile + tl.load(tiles_ptr + i).to(tl.int32)
    first, end = candidate_range(b, tile, docs_ptr, S, tile >= 0, C, R, WINDOW, SINKS, HAS_DOCS)
    block = tl.program_id(1) * BN + tl.arange(0, BN)
    ok = (block >= first) & (block < end)
    at = block_ptr + line.to(tl.int64) * N + block
    tl.store(at, tl.where(ok, block, -1), mask=block < N)
