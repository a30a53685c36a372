"""Tile sizes of the Triton kernels, by architecture and shape. Measured, see the notebook."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """rows and keys per step (BM, BN), warps per program, pipeline stages of the main loop."""

    rows: int
    keys: int
    warps: int
    stages: int


def _rows(wanted: int, available: int) -> int:
    """Largest power of two up to `wanted` that is no larger than needed for `available` rows."""
    rows = 16
    while rows < wanted and rows < available:
        rows *= 2
    return rows


def _keys(wanted: int, block: int) -> int:
    """Keys per step: whole blocks, or an even part of one."""
    return max(16, min(wanted, block) if block >= wanted else wanted)


def forward(rows: int, block: int, width: int, itemsize: int) -> Launch:
    """rows: R G of a tile; block: C; width: E."""
    if itemsize > 2 or width > 128:
        return Launch(_rows(64, rows), _keys(32, block), 4, 2)
    bm = _rows(256, rows)
    return Launch(bm, _keys(64, block), 8 if bm > 64 else 4, 3)


def query_gradient(rows: int, block: int, width: int, itemsize: int) -> Launch:
    if itemsize > 2 or width > 128:
        return Launch(_rows(32, rows), _keys(32, block), 4, 1)
    bm = _rows(128, rows)
    return Launch(bm, _keys(64, block), 8 if bm > 64 else 4, 2)


def key_gradient(rows: int, block: int, width: int, itemsize: int) -> Launch:
    """keys is unused: a program owns one block."""
    if itemsize > 2 or width > 128:
        return Launch(32, block, 4, 1)
    return Launch(64, block, 4 if block <= 64 else 8, 2)


ROWS_PER_SEGMENT = 16384  # query rows (of one key-value head) that one program may walk
