"""The best single keys of those rows whose guessed threshold was wrong (see triton_filter.py).

`pick_kernel` names such rows; here 64 of them, wherever they stand, are a tile, and its keys are
split among so many programs as there are. `digit_kernel` counts the keys that reach each of 16
thresholds. Compared scores are integers of 20 bits (see triton_select.ordered), so five launches,
each between two thresholds of the one before, find a row's last choice. The last one keeps its
counts of each split, from which `write_kernel` knows the place of every choice. Every launch
scores the keys again, and where no row is named leaves at once.

Legend: B batch, H selection heads, J index heads, R queries per tile, BM rows of a tile and BN
keys per step; an item is a tile's split.
"""

import triton
import triton.language as tl

from .triton_rows import rows_of, step_scores
from .triton_select import EMPTY, fill, ordered, wanted_of

DIGITS = 5
LEAST = tl.constexpr(-(1 << 19))  # no key is lower
NONE = tl.constexpr(-(1 << 20))  # below every threshold: that of no candidate
STEP = tl.constexpr(64)  # a multiple of BN
LONGEST_SPLIT = tl.constexpr(1 << 15)  # keys, whose counts fit into 16 bits


@triton.jit
def candidate(score, ok):
    key = ordered(score, ok)
    return tl.where(key > EMPTY, key, NONE)


@triton.jit
def splits_of(n, columns, programs, BM: tl.constexpr, MOST: tl.constexpr):
    """(tiles, splits of each) of n rows. At most max(programs, tiles * ceil(columns / 2^15))."""
    tiles = (n + (BM - 1)) // BM
    needed = (columns + (LONGEST_SPLIT - 1)) // LONGEST_SPLIT
    return tiles, tl.maximum(tl.minimum(programs // tl.maximum(tiles, 1), MOST), needed)


@triton.jit
def narrowed(total_ptr, slot, ok, want, done, DIGITS: tl.constexpr):
    """(the least key that a row's last choice can have, keys wanted, last digit) of rows of whose
    thresholds `done` digits are counted."""
    low = tl.zeros_like(slot).to(tl.int32) + LEAST
    digit = low * 0
    wanted = want
    n = tl.arange(0, 16)[None, :]
    for level in range(done):
        at = (slot * DIGITS + level)[:, None] * 16 + n
        count = tl.load(total_ptr + at, mask=ok[:, None], other=0)
        if level == 0:
            wanted = tl.minimum(wanted, tl.max(count, 1))
        digit = tl.sum(((count >= wanted[:, None]) & (n > 0)).to(tl.int32), 1)
        low += digit << (4 * (DIGITS - 1 - level))
    return low, wanted, digit


@triton.jit
def item_range(first, end, split, splits):
    """Columns (from, to) of one of a tile's splits, the same in every launch."""
    low = tl.min(first, 0) // STEP * STEP
    columns = tl.maximum(tl.max(end, 0) - low, 0)
    length = (columns + (splits * STEP - 1)) // (splits * STEP) * STEP
    return low + split * length, tl.minimum(low + (split + 1) * length, tl.max(end, 0))


@triton.jit(
    do_not_specialize=[
        "T",
        "q_start",
        "first_tile",
        "rows",
        "columns",
        "key_rows",
        "items",
        "most",
        "level",
    ]
)
def digit_kernel(
    q_ptr,  # [B, T, J, I]
    k_ptr,  # [B, key_rows, I]
    weight_ptr,  # [B, T, J]
    bias_ptr,  # [J]
    docs_ptr,  # [B, S]
    wanted_ptr,  # [B, H, rows] int32, where HAS_WANTED
    named_ptr,  # [B, H, rows] int32: rows to choose for, in no order
    n_named_ptr,  # [B, H] int32
    total_ptr,  # [B, H, rows, DIGITS, 16] int32: of a row's keys, those that reach a threshold
    item_ptr,  # [B, H, items, 17, BM] int32: the same of an item, at the last level
    T,
    S,
    q_start,
    first_tile,
    rows,
    columns,
    key_rows,
    items,
    most,
    level,  # which digit, from the highest
    scale,
    J: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    BI: tl.constexpr,
    R: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    SIGMOID: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    HAS_WANTED: tl.constexpr,
    DIGITS: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    which = tl.program_id(1).to(tl.int64)
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    n_named = tl.load(n_named_ptr + which)
    tiles, splits = splits_of(n_named, columns, tl.num_programs(0), BM, SPLITS)
    n = tl.arange(0, BN)
    k_base = k_ptr + b.to(tl.int64) * key_rows * WIDTH
    for item in range(tl.program_id(0), tiles * splits, tl.num_programs(0)):
        rank = item // splits * BM + tl.arange(0, BM)
        ok = rank < n_named
        slot = which * rows + rank
        row = tl.load(named_ptr + slot, mask=ok, other=0)
        tile = first_tile + row
        first, end, qs, weights, biases = rows_of(
            q_ptr, weight_ptr, bias_ptr, docs_ptr, b, h, tile, ok, T, S, q_start, J, H, WIDTH, BI,
            R, WINDOW, SINKS, SIGMOID, HAS_BIAS, HAS_DOCS
        )  # fmt: skip
        want = wanted_of(wanted_ptr, which * rows + row, ok, most, HAS_WANTED)
        low, _, _ = narrowed(total_ptr, slot, ok, want, level, DIGITS)
        begin, stop = item_range(first, end, item % splits, splits)
        # Keys of four buckets in the bytes of a word, and of many steps in 16 bits each.
        even_0, even_1, even_2, even_3 = row * 0, row * 0, row * 0, row * 0
        odd_0, odd_1, odd_2, odd_3 = row * 0, row * 0, row * 0, row * 0
        over = row * 0
        for column_0 in range(begin, stop, BN):
            score = step_scores(
                q_ptr, k_base, column_0, key_rows, qs, weights, biases, scale, J // H, WIDTH, BI,
                BN, SIGMOID, WIDE, HAS_BIAS
            )  # fmt: skip
            column = (column_0 + n)[None, :]
            in_range = (column >= first[:, None]) & (column < end[:, None])
            bucket = (candidate(score, in_range) - low[:, None]) >> (4 * (DIGITS - 1 - level))
            word = bucket >> 2
            one = 1 << ((bucket & 3) * 8)
            part = tl.sum(tl.where(word == 0, one, 0), 1)
            even_0, odd_0 = even_0 + (part & 0xFF00FF), odd_0 + ((part >> 8) & 0xFF00FF)
            part = tl.sum(tl.where(word == 1, one, 0), 1)
            even_1, odd_1 = even_1 + (part & 0xFF00FF), odd_1 + ((part >> 8) & 0xFF00FF)
            part = tl.sum(tl.where(word == 2, one, 0), 1)
            even_2, odd_2 = even_2 + (part & 0xFF00FF), odd_2 + ((part >> 8) & 0xFF00FF)
            part = tl.sum(tl.where(word == 3, one, 0), 1)
            even_3, odd_3 = even_3 + (part & 0xFF00FF), odd_3 + ((part >> 8) & 0xFF00FF)
            over += tl.sum((word > 3).to(tl.int32), 1)
        evens, odds = (even_0, even_1, even_2, even_3), (odd_0, odd_1, odd_2, odd_3)
        total = total_ptr + (slot * DIGITS + level) * 16
        kept = item_ptr + (which * items + item) * (17 * BM) + tl.arange(0, BM)
        last = ok & (row * 0 + level == DIGITS - 1)
        tl.store(kept + 16 * BM, over, mask=last)
        for digit in tl.static_range(15, -1, -1):
            pair = evens[digit // 4]
            if digit % 2:
                pair = odds[digit // 4]
            over += (pair >> (16 * (digit // 2 % 2))) & 0xFFFF
            tl.atomic_add(total + digit, over, mask=ok & (over > 0), sem="relaxed")
            tl.store(kept + digit * BM, over, mask=last)


@triton.jit(
    do_not_specialize=[
        "T",
        "q_start",
        "first_tile",
        "rows",
        "columns",
        "key_rows",
        "items",
        "most",
        "width",
    ]
)
def write_kernel(
    q_ptr,  # as digit_kernel's
    k_ptr,
    weight_ptr,
    bias_ptr,
    docs_ptr,
    wanted_ptr,
    named_ptr,
    n_named_ptr,
    total_ptr,
    item_ptr,
    out_ptr,  # [B, H, rows, width] int32
    fine_ptr,  # [1] int32, set to 0 where a candidate is NaN
    T,
    S,
    q_start,
    first_tile,
    rows,
    columns,
    key_rows,
    items,
    most,
    width,
    scale,
    J: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    BI: tl.constexpr,
    R: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    SIGMOID: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DOCS: tl.constexpr,
    HAS_WANTED: tl.constexpr,
    DIGITS: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    which = tl.program_id(1).to(tl.int64)
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    n_named = tl.load(n_named_ptr + which)
    tiles, splits = splits_of(n_named, columns, tl.num_programs(0), BM, SPLITS)
    n = tl.arange(0, BN)
    k_base = k_ptr + b.to(tl.int64) * key_rows * WIDTH
    for item in range(tl.program_id(0), tiles * splits, tl.num_programs(0)):
        split = item % splits
        rank = item // splits * BM + tl.arange(0, BM)
        ok = rank < n_named
        slot = which * rows + rank
        row = tl.load(named_ptr + slot, mask=ok, other=0)
        want = wanted_of(wanted_ptr, which * rows + row, ok, most, HAS_WANTED)
        threshold, wanted, digit = narrowed(total_ptr, slot, ok, want, DIGITS, DIGITS)
        above, place, ties, nan = row * 0, row * 0, row * 0, row * 0
        kept = item_ptr + (which * items + (item - split)) * (17 * BM) + tl.arange(0, BM)
        for split_0 in range(0, splits, 16):
            other = split_0 + tl.arange(0, 16)[None, :]
            at = kept[:, None] + (other * 17 + digit[:, None]) * BM
            there = ok[:, None] & (other < splits)
            reach = tl.load(at, mask=there, other=0)
            exceed = tl.load(at + BM, mask=there, other=0)
            above += tl.sum(exceed, 1)
            place += tl.sum(tl.where(other < split, exceed, 0), 1)
            ties += tl.sum(tl.where(other < split, reach - exceed, 0), 1)
        room = wanted - above
        out = out_ptr + (which * rows + row)[:, None] * width
        if split == 0:
            fill(out, wanted, ok, width, min(BW, 16))  # more would spill
        tile = first_tile + row
        first, end, qs, weights, biases = rows_of(
            q_ptr, weight_ptr, bias_ptr, docs_ptr, b, h, tile, ok, T, S, q_start, J, H, WIDTH, BI,
            R, WINDOW, SINKS, SIGMOID, HAS_BIAS, HAS_DOCS
        )  # fmt: skip
        begin, stop = item_range(first, end, split, splits)
        for column_0 in range(begin, stop, BN):
            score = step_scores(
                q_ptr, k_base, column_0, key_rows, qs, weights, biases, scale, J // H, WIDTH, BI,
                BN, SIGMOID, WIDE, HAS_BIAS
            )  # fmt: skip
            column = (column_0 + n)[None, :]
            in_range = (column >= first[:, None]) & (column < end[:, None])
            nan = tl.maximum(nan, tl.max(((score != score) & in_range).to(tl.int32), 1))
            key = candidate(score, in_range)
            best, tie = key > threshold[:, None], key == threshold[:, None]
            # Both running counts in one scan: above in the upper 16 bits, ties in the lower.
            both = tl.cumsum(best.to(tl.int32) * 65536 + tie.to(tl.int32), 1)
            tied = ties[:, None] + (both & 65535)
            keep = best | (tie & (tied <= room[:, None]))
            at = place[:, None] + (both >> 16) + tl.minimum(tied, room[:, None]) - 1
            found = column + tl.zeros([BM, BN], tl.int32)
            # NaN, above all others, may be more than wanted.
            tl.store(out + at, found, mask=keep & (at >= 0) & (at < width))
            place += tl.sum(best.to(tl.int32), 1)
            ties += tl.sum(tie.to(tl.int32), 1)
        tl.store(fine_ptr, 0, mask=tl.max(nan, 0) > 0)
