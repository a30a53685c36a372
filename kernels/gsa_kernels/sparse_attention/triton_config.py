"""Tile sizes of the Triton kernels, by architecture and shape.

Measured on sm_90, see the notebook; `owned_keys` is chosen from registers and shared memory alone.
To try there: 64 rows and 4 warps (144 B spilled outside the loop).
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gsa_kernels.selection import Selection
from gsa_kernels.sizes import ceil_div, power_of_2


@dataclass(frozen=True)
class Launch:
    """rows and keys per step (BM, BN), warps per program, pipeline stages of the main loop,
    whether keys are fetched by the tensor memory accelerator (sm_90 and newer), and registers of
    a thread (None: any)."""

    rows: int
    keys: int
    warps: int
    stages: int
    tma: bool = False
    range_stages: int = 2  # of the loops over sinks and local windows
    registers: int | None = None


@cache  # asking a device takes the host microseconds
def has_tma(device: torch.device) -> bool:
    """Whether the device has a tensor memory accelerator; the interpreter behaves as if."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


@cache
def has_tensor_memory(device: torch.device) -> bool:
    """Whether products are added up in tensor memory (sm_100 and newer)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10


def _rows(wanted: int, available: int) -> int:
    """Largest power of two up to `wanted` that is no larger than needed for `available` rows."""
    rows = 16
    while rows < wanted and rows < available:
        rows *= 2
    return rows


def _keys(wanted: int, block: int) -> int:
    """Keys per step: whole blocks, or an even part of one."""
    return max(16, min(wanted, block) if block >= wanted else wanted)


def forward(
    rows: int,
    block: int,
    width: int,
    itemsize: int,
    device: torch.device,
    united: bool,
    mass: bool = False,
) -> Launch:
    """rows: R G of a tile; block: C; width: E. A united list is walked block by block."""
    if united:
        big = itemsize > 2 or width > 128
        bm = _rows(32 if big else 64, rows)
        if block == 1:  # gathered key by key
            if big or not has_tma(device):
                return Launch(bm, 32, 8, 2) if big else Launch(bm, 64, 4, 3)
            # Of 128 registers four programs fit onto a multiprocessor.
            return Launch(bm, 32, 4, 3, registers=None if has_tensor_memory(device) else 128)
        return Launch(bm, block, 8 if big else 4, 2 if big else 4, tma=not big and has_tma(device))
    if itemsize > 2 or width > 128:
        return Launch(_rows(32, rows), _keys(32, block), 8 if itemsize > 2 else 4, 2)
    if not has_tma(device):
        bm = _rows(128, rows)
        return Launch(bm, _keys(64, block), 8 if bm > 64 else 4, 3)
    # Rows that gather parts of blocks also keep addresses: more of them would spill.
    # So would 256 on sm_100, not timed there: two programs of 128 fit a multiprocessor.
    tensor_memory = has_tensor_memory(device)
    bm = _rows(256 if block >= 64 and not tensor_memory else 128, rows)
    # Two programs of 64 rows fit a multiprocessor if their shared memory stays under half of it:
    # 7.0 -> 5.7 ms. With the mass, one with longer loads is faster: 9.7 -> 7.7 ms.
    stages = 5 if (bm > 64 or mass) and not tensor_memory else 4
    return Launch(bm, _keys(64, block), 8 if bm > 64 else 4, stages, tma=True)


def united_queries(
    block: int, width: int, itemsize: int, device: torch.device, atomic: bool
) -> int:
    """Neighbouring queries, of those that choose alone, whose lists are united in the backward:
    more of them add less to the gradients of keys, but multiply more in vain."""
    wide = block == 1 and atomic and itemsize == 2 and width <= 128 and has_tma(device)
    return 32 if wide else 16


def query_gradient(
    rows: int,
    block: int,
    width: int,
    itemsize: int,
    device: torch.device,
    united: bool,
    atomic: bool,
) -> Launch:
    """atomic: the kernel also adds up dk and dv."""
    if united:
        big = itemsize > 2 or width > 128
        bm = _rows(32 if big else 64, rows)
        if block == 1:
            if big:
                return Launch(bm, 32, 8, 1)
            if not atomic:
                return Launch(bm, 32, 4, 3)
            if not has_tma(device):
                return Launch(bm, 64, 8, 2)
            bm = _rows(128, rows)
            # Of 64 rows two programs fit a multiprocessor, with the products of dk and dv narrow.
            return Launch(bm, 64, 8, 3) if bm > 64 else Launch(bm, 32, 4, 3)
        return Launch(bm, block, 8 if big else 4, 1 if big else 3, tma=not big and has_tma(device))
    if itemsize > 2 or width > 128:
        return Launch(_rows(32, rows), _keys(32, block), 8, 1)
    if not has_tma(device):
        return Launch(_rows(64, rows), _keys(64, block), 8 if atomic else 4, 2)
    if atomic:
        return Launch(_rows(64, rows), _keys(64, block), 8, 2)
    return Launch(_rows(64, rows), _keys(64, block), 4, 4, tma=True)


def key_gradient(
    tile: int, group: int, block: int, width: int, itemsize: int, device: torch.device
) -> Launch:
    """rows: a divisor of R G, and of R where a step is one box; any where R is 1. keys: C, which
    a program owns."""
    wanted = 64
    if itemsize > 2 or width > 128:
        wanted = 16 if itemsize > 2 else 32
    elif not has_tma(device):
        wanted = 32
    rows = wanted
    while tile > 1 and tile * group % rows:
        rows //= 2
    assert rows >= 16, "query tiles are multiples of 16"
    if itemsize > 2 or width > 128:
        return Launch(rows, block, 8, 1)
    tma = has_tma(device) and tile % rows == 0
    return Launch(rows, block, 4 if block <= 64 else 8, 3 if has_tma(device) else 2, tma)


ROWS_PER_SEGMENT = 16384  # query rows (of one key-value head) that one program may walk

# Whether dk, dv of single keys per query (C = R = 1) come from programs that own key blocks even
# where the backward need not be deterministic; else dq's kernel adds them atomically.
OWNED_TOKENS = False


# From so many queries on, those that choose their own blocks (R = 1) are gathered in the backward.
GATHER_BACKWARD_FROM = 32768
GATHERED_PARTS = 0.9  # memory of the parts of dq that are held at a time, over that of q
SUMMED_ROWS = 16  # of a program that adds them up


@dataclass(frozen=True)
class GatherLaunch:
    """rows, warps, stages: of a step; longest: rows of an item."""

    rows: int
    warps: int
    stages: int
    longest: int = 2048


def gathered_gradient(
    group: int, block: int, width: int, itemsize: int, device: torch.device
) -> GatherLaunch:
    """rows: queries of a step times the G heads of their group. dk, dv of a block stay in the
    registers."""
    least = power_of_2(group)
    if itemsize > 2 or width > 128:
        return GatherLaunch(max(16, least), 8, 1)
    warps = 4 if block <= 64 else 8
    if not has_tma(device):
        return GatherLaunch(max(16, least), warps, 3)
    return GatherLaunch(max(32, least), warps, 5)


def owned_keys(group: int, block: int, width: int, itemsize: int, biased: bool) -> Launch:
    """rows: queries of a step times the G heads of their group; 64 are fewer steps, but spill."""
    rows = _rows(16 if itemsize > 2 else 32, 16 * group)
    while rows < group:
        rows *= 2
    big = itemsize > 2 or width > 128
    return Launch(rows, block, 8 if big or biased else 4, 1 if big else 2)


# Queries that choose for themselves (R = 1), in calls of so many, have their far choices gathered.
GATHER_FROM = 32768
GATHER_UNITED = 8  # of the 16 queries of the group before that make a choice near; 17: none is
GATHER_LONGEST = 128  # queries of a key block that a program gathers at a time
GATHER_PAIRS = True  # whether two choices whose blocks follow each other can be gathered as one
GATHER_CHUNK = 32768  # most queries whose parts are held at once
# Most bytes of parts, whatever q takes, and what they may take at least. More are fewer launches,
# at whose ends multiprocessors wait for the last program.
GATHER_BYTES = 1 << 30
GATHER_LEAST_BYTES = 1 << 29


@dataclass(frozen=True)
class GatherStep:
    """rows, warps and stages of a step that gathers; registers of a thread (None: any); programs,
    which stay until all is gathered."""

    rows: int
    warps: int
    stages: int
    registers: int | None
    programs: int


@dataclass(frozen=True)
class Gather:
    """How single blocks and, unless None, pairs of them are gathered; rows of a program that
    combines."""

    singles: GatherStep
    pairs: GatherStep | None
    combined: int


def gather(q: Tensor, k: Tensor, selection: Selection) -> Gather | None:
    """How the far choices of q [B, T, H, E] are gathered, keys k [B, S, K, E]; None where the
    union tiles take all choices: where calls are short or tiles choose, and where a block or the
    heads of a group do not fit a program."""
    spec, slots = selection.spec, selection.blocks_BHQN.shape[3]
    if spec.query_tile > 1 or not slots or q.shape[1] < GATHER_FROM:
        return None
    group, block, itemsize = q.shape[2] // k.shape[2], spec.key_block, q.element_size()
    held = 2 * block * max(16, power_of_2(q.shape[3])) * itemsize
    if block not in (16, 32, 64, 128) or held > 1 << 16 or group > (32 if itemsize > 2 else 64):
        return None
    small, processors = held <= 1 << 15, _processors(q.device)
    registers, programs = None, 2 * processors
    if itemsize > 2:
        rows = max(16, power_of_2(group))  # 32 spill
        singles = GatherStep(rows, 8, 2, 255, programs)
        pairs = GatherStep(rows, 8, 1, 255, programs)
    else:
        if small and has_tma(q.device):  # with 74 KB, three programs fit a multiprocessor
            registers, programs = 168, 3 * processors
        singles = GatherStep(64, 4, 2, registers, programs)
        pairs = GatherStep(64, 4, 1, None, 2 * processors)  # 82 KB
    paired = pairs if GATHER_PAIRS and small else None
    return Gather(singles, paired, max(32, power_of_2(group)))


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def chunk_of_queries(queries: int, most: int) -> int:
    """Queries of a chunk, of as few equal chunks as hold at most so many each."""
    return ceil_div(queries, ceil_div(queries, max(1, most)))


def bytes_of_parts(q: Tensor) -> int:
    """Most bytes that the parts of queries q may take: twice those of q, within the bounds."""
    return min(GATHER_BYTES, max(GATHER_LEAST_BYTES, 2 * q.numel() * q.element_size()))


@dataclass(frozen=True)
class PairSums:
    """each: heads of a unit, which share a key-value head; units of a launch; keys and stages of a
    step."""

    each: int
    units: int
    keys: int
    stages: int


def pair_sums(
    shared: int, group: int, width: int, itemsize: int, gradient: bool, device: torch.device
) -> PairSums:
    """shared: heads that share a selection; group: G. The queries of a launch stay in shared
    memory, and with the gradient dO: of the 227 KB of sm_90 64, of the 99 of small GPUs 32."""
    most = 1 << 16 if has_tma(device) else 1 << 15
    row = 16 * max(16, power_of_2(width)) * itemsize * (2 if gradient else 1)
    each = group
    while each > 1 and power_of_2(each) * row > most // 2:
        each = each // 2 if each % 2 == 0 else 1
    units = min(4, shared // each, max(1, most // (power_of_2(each) * row)))
    while shared // each % units:
        units -= 1
    big = itemsize > 2 or width > 128
    keys = 32 if big or gradient else 64
    return PairSums(each, units, keys, 1 if big else 3)


def decode(rows: int, width: int, itemsize: int) -> Launch:
    """rows: those of a tile that take part. A program takes one step, its loads all in flight.
    Not measured: small programs, so that one sequence with four key-value heads and 2048 keys
    occupies half of a large GPU."""
    if itemsize > 2 or width > 128:
        return Launch(_rows(16, rows), 32, 4, 1)
    bm = _rows(64, rows)
    return Launch(bm, 128, 4 if bm == 16 else 8, 1)
