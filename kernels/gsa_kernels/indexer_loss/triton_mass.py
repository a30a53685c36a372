"""Dense attention mass of a few query tiles: log-sum-exp of each row, then mass of each key block.

Two passes over the keys, so that what is held is one number per row and split and never a logit.
The first is split over ranges of keys, as there are few tiles; its parts are merged by a small
kernel. In the second a program owns BN keys of a tile and adds up all rows and heads itself:
nothing is atomic and every result is the same each time.

Legend: B batch, T queries, S keys, H query heads, K key-value heads, G = H / K, E head width,
n tiles, R queries per tile, C keys per block, HS selection heads, BM rows and BN keys per step.
"""

import triton
import triton.language as tl

from gsa_kernels.sparse_attention.triton_forward import logits_of, tile_rows


@triton.jit
def document_start(docs_ptr, b, S, position, mask, HAS_DOCS: tl.constexpr):
    """First position of the document of each position; 0 where there are no documents."""
    if HAS_DOCS:
        at = docs_ptr + b.to(tl.int64) * S + position
        return tl.load(at, mask=mask, other=0).to(tl.int32)
    return position * 0


@triton.jit
def load_rows(q_ptr, b, t, head, ok, T, H, E: tl.constexpr, BE: tl.constexpr):
    """[BM, BE] query rows."""
    e = tl.arange(0, BE)
    offset = ((b.to(tl.int64) * T + t) * H + head) * E
    return tl.load(q_ptr + offset[:, None] + e, mask=ok[:, None] & (e < E), other=0.0)


@triton.jit
def load_keys(k_base, key, high, K: tl.constexpr, E: tl.constexpr, BE: tl.constexpr):
    """[BE, BN] keys of one head, those before `high`."""
    e = tl.arange(0, BE)
    offset = key.to(tl.int64) * (K * E)
    ok = (key < high)[None, :] & (e < E)[:, None]
    return tl.load(k_base + offset[None, :] + e[:, None], mask=ok, other=0.0)


@triton.jit
def lse_kernel(
    q_ptr,
    k_ptr,
    tiles_ptr,  # [n]: tile numbers, counted from the first tile of the queries
    docs_ptr,  # [B, S]
    part_ptr,  # [B, n, K, PARTS, BM, SPLITS] float32: log2 of the sum of exponentials of a split
    T,
    S,
    q_start,
    first_tile,
    n,
    span,  # keys of a split, a multiple of BN
    scale_log2,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    STAGES: tl.constexpr,
):
    G: tl.constexpr = H // K
    PARTS: tl.constexpr = (R * G + BM - 1) // BM
    pid, split = tl.program_id(0), tl.program_id(1)
    part, kv_head, line = pid % PARTS, pid // PARTS % K, pid // (PARTS * K)
    b, i = line // n, line % n
    tile = first_tile + tl.load(tiles_ptr + i).to(tl.int32)
    position, t, head, ok = tile_rows(part, kv_head, tile, q_start, T, H, G, R, BM)
    position = tl.where(ok, position, -1)  # a padded row sees no key
    q = load_rows(q_ptr, b, t, head, ok, T, H, E, BE)
    start = document_start(docs_ptr, b, S, position, ok, HAS_DOCS)
    low = split * span
    high = tl.minimum(tl.minimum(low + span, tile * R + R), q_start + T)
    first = document_start(docs_ptr, b, S, tl.maximum(tile * R, q_start), True, HAS_DOCS)
    low = tl.maximum(low, first // BN * BN)
    k_base = k_ptr + (b.to(tl.int64) * S * K + kv_head) * E
    m = tl.full([BM], float("-inf"), tl.float32)
    norm = tl.zeros([BM], tl.float32)
    for at in tl.range(low, high, BN, num_stages=STAGES):
        key = at + tl.arange(0, BN)
        k = load_keys(k_base, key, high, K, E, BE)
        s = logits_of(q, k, scale_log2)
        keep = key[None, :] <= position[:, None]
        if HAS_DOCS:
            keep = keep & (key[None, :] >= start[:, None])
        s = tl.where(keep, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        norm = norm * tl.exp2(m - safe) + tl.sum(tl.exp2(s - safe[:, None]), 1)
        m = m_new
    row = pid.to(tl.int64) * BM + tl.arange(0, BM)
    tl.store(part_ptr + row * SPLITS + split, m + tl.log2(norm))


@triton.jit
def merge_kernel(part_ptr, lse_ptr, SPLITS: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr):
    """lse_ptr [B, n, K, PARTS, BM]: log2-sum-exp2 over splits; +inf for rows without a key."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    split = tl.arange(0, BS)
    at = part_ptr + row[:, None] * SPLITS + split[None, :]
    x = tl.load(at, mask=(split < SPLITS)[None, :], other=float("-inf"))
    top = tl.max(x, 1)
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(x - safe[:, None]), 1)
    tl.store(lse_ptr + row, tl.where(total == 0.0, float("inf"), safe + tl.log2(total)))


@triton.jit
def block_mass_kernel(
    q_ptr,
    k_ptr,
    tiles_ptr,
    docs_ptr,
    lse_ptr,  # [B, n, K, PARTS, BM] float32, log2
    mass_ptr,  # [B, HS, n, blocks] float32
    T,
    S,
    q_start,
    first_tile,
    n,
    blocks,
    scale_log2,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    HS: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_DOCS: tl.constexpr,
):
    G: tl.constexpr = H // K
    PARTS: tl.constexpr = (R * G + BM - 1) // BM
    SLOTS: tl.constexpr = BN // C
    # Programs that read the same keys run together.
    line, low = tl.program_id(0), tl.program_id(1) * BN
    i, hs, b = line % n, line // n % HS, line // (n * HS)
    tile = first_tile + tl.load(tiles_ptr + i).to(tl.int32)
    begin = tl.maximum(tile * R, q_start)
    high = tl.minimum(tile * R + R, q_start + T)
    first = document_start(docs_ptr, b, S, begin, True, HAS_DOCS)
    key = low + tl.arange(0, BN)
    total = tl.zeros([BM, BN], tl.float32)
    if (low < high) & (low + BN > first):
        for kv_head in tl.range(hs * (K // HS), (hs + 1) * (K // HS), num_stages=1):
            k_base = k_ptr + (b.to(tl.int64) * S * K + kv_head) * E
            k = load_keys(k_base, key, high, K, E, BE)
            for part in tl.range(0, PARTS, num_stages=1):
                position, t, head, ok = tile_rows(part, kv_head, tile, q_start, T, H, G, R, BM)
                q = load_rows(q_ptr, b, t, head, ok, T, H, E, BE)
                row = (((b * n + i) * K + kv_head) * PARTS + part).to(tl.int64) * BM
                lse = tl.load(lse_ptr + row + tl.arange(0, BM))
                p = tl.exp2(logits_of(q, k, scale_log2) - lse[:, None])
                keep = key[None, :] <= position[:, None]
                if HAS_DOCS:
                    start = document_start(docs_ptr, b, S, position, ok, HAS_DOCS)
                    keep = keep & (key[None, :] >= start[:, None])
                total += tl.where(keep, p, 0.0)
    mean = tl.sum(total, 0) / ((high - begin) * (H // HS))
    mean = tl.sum(tl.reshape(mean, [SLOTS, C]), 1)
    block = low // C + tl.arange(0, SLOTS)
    tl.store(mass_ptr + line.to(tl.int64) * blocks + block, mean, mask=block < blocks)
