"""How much work an attention over a Selection is, and the least time it can take.

Counted of the actual selection, for all heads: pairs attended; pairs computed, since a program
multiplies whole blocks by whole tiles (of 16 united queries where each query has its own list);
and key rows fetched for them. Legend as in case.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gsa_kernels.selection import Selection

# Neighbouring queries that share their gathers where R = 1. The backward of single keys may unite
# 32: it then fetches less and computes more than counted here.
UNITED = 16
OWNED = 16  # keys of the smallest blocks whose gradients are owned and not added atomically
_CHUNK = 1 << 24  # slots looked at at once


@dataclass(frozen=True)
class Work:
    """pairs attended and pairs computed over all query heads; key rows fetched over all kv heads
    and groups of queries (each a key and a value of E channels); group: queries per program;
    block: C."""

    pairs: float
    computed: float
    rows: float
    group: int
    block: int

    @property
    def inflation(self) -> float:
        return self.computed / self.pairs


@dataclass(frozen=True)
class Rates:
    """What the device reached in this process: FLOP/s of a matrix product, bytes/s of a copy."""

    flops: float
    bytes_s: float


@torch.no_grad()
def work(selection: Selection, heads: int, kv_heads: int) -> Work:
    """Counts for H query heads and K key-value heads."""
    spec = selection.spec
    pairs = float(selection.attended_BHT().double().sum()) * heads / _choices(selection)
    if spec.query_tile > 1:
        group, blocks = spec.query_tile, _tile_blocks(selection)
    else:
        group, blocks = UNITED, _union_blocks(selection)
    group = min(group, selection.n_queries)
    # Per head, summed over the groups of queries.
    keys = blocks * spec.key_block / _choices(selection)
    return Work(pairs, keys * group * heads, keys * kv_heads, group, spec.key_block)


def _choices(selection: Selection) -> int:
    return selection.blocks_BHQN.shape[1]


def _tiles(selection: Selection, multiple: int = 1) -> list[slice]:
    slots = selection.sink_slots + selection.blocks_BHQN.shape[-1] + selection.spec.local_slots
    batch = selection.blocks_BHQN.shape[0] * _choices(selection)
    step = max(1, _CHUNK // (slots * batch * multiple)) * multiple
    last = selection.layout.n_tiles
    return [slice(low, min(last, low + step)) for low in range(0, last, step)]


def _tile_blocks(selection: Selection) -> float:
    """Blocks over all tiles."""
    return float(sum(selection.slots(part)[1].sum() for part in _tiles(selection)))


def _union_blocks(selection: Selection) -> float:
    """Blocks in the unions of UNITED neighbouring queries, over all of them."""
    total = 0.0
    for part in _tiles(selection, UNITED):
        blocks, valid = selection.slots(part)
        place = blocks.masked_fill(~valid, -1)
        missing = -place.shape[2] % UNITED
        place = torch.nn.functional.pad(place, (0, 0, 0, missing), value=-1)
        total += _distinct(place.unflatten(2, (-1, UNITED)).flatten(3))
    return total


def _distinct(places: Tensor) -> float:
    """Different numbers from 0 in each row, summed over the rows."""
    ordered = places.sort(-1).values
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    return float((new & (ordered >= 0)).sum())


def traffic(q: Tensor, k: Tensor, found: Work, backward: bool) -> tuple[float, float]:
    """(compulsory, gathered) bytes of the attention.

    Compulsory: q, k, v and out once; with the backward also their gradients and the second
    reading, three times as much. Gathered: what the programs fetch for their lists; the backward
    fetches keys for dq again, and for dk and dv the queries and output gradients of every block,
    or adds to the gradients of every key where blocks are small.
    """
    item, width = q.element_size(), q.shape[-1]
    small = 2.0 * q.numel() * item
    compulsory = small + 2.0 * k.numel() * item
    gathered = small + 2.0 * found.rows * width * item
    if not backward:
        return compulsory, gathered
    if found.block < OWNED:  # float32 of every fetched key and value
        return 3 * compulsory, 2 * gathered + 2.0 * found.rows * width * 4
    # A block of one kv head meets group x (H / K) query rows in every group that chose it.
    queries = found.rows / found.block * found.group * (q.shape[2] / k.shape[2])
    return 3 * compulsory, 2 * gathered + 2.0 * queries * width * item


def shares(
    q: Tensor, k: Tensor, found: Work, backward: bool, ms: float, rates: Rates
) -> dict[str, float]:
    """Fields of a record: FLOPs and bytes, and the part of the bound that `ms` reaches.

    A forward is 2 products of 2 E operations a pair, a backward 5 more. `roofline` is the larger
    of useful FLOPs and compulsory bytes at the measured rates, over the time. gathered_share can
    exceed 1: gathered rows come from the L2 cache, which is faster than the memory.
    """
    per_pair = 2.0 * q.shape[-1] * (7 if backward else 2)
    compulsory, gathered = traffic(q, k, found, backward)
    seconds = ms / 1e3
    flops, computed = found.pairs * per_pair, found.computed * per_pair
    least = max(flops / rates.flops, compulsory / rates.bytes_s)
    return {
        "flops": flops,
        "flops_computed": computed,
        "inflation": found.inflation,
        "bytes": compulsory,
        "bytes_gathered": gathered,
        "flops_share": flops / rates.flops / seconds,
        "flops_computed_share": computed / rates.flops / seconds,
        "bytes_share": compulsory / rates.bytes_s / seconds,
        "gathered_share": gathered / rates.bytes_s / seconds,
        "roofline": least / seconds,
    }
