"""Tile sizes of the Triton kernels, by architecture and shape. Measured, see the notebook."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Launch:
    """rows and keys per step (BM, BN), warps per program, pipeline stages of the main loop, and
    whether keys are fetched by the tensor memory accelerator (sm_90 and newer)."""

    rows: int
    keys: int
    warps: int
    stages: int
    tma: bool = False


def has_tma(device: torch.device) -> bool:
    """Whether the device has a tensor memory accelerator; the interpreter behaves as if."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


def _rows(wanted: int, available: int) -> int:
    """Largest power of two up to `wanted` that is no larger than needed for `available` rows."""
    rows = 16
    while rows < wanted and rows < available:
        rows *= 2
    return rows


def _keys(wanted: int, block: int) -> int:
    """Keys per step: whole blocks, or an even part of one."""
    return max(16, min(wanted, block) if block >= wanted else wanted)


def forward(rows: int, block: int, width: int, itemsize: int, device: torch.device) -> Launch:
    """rows: R G of a tile; block: C; width: E."""
    if itemsize > 2 or width > 128:
        return Launch(_rows(32, rows), _keys(32, block), 8 if itemsize > 2 else 4, 2)
    if not has_tma(device):
        bm = _rows(128, rows)
        return Launch(bm, _keys(64, block), 8 if bm > 64 else 4, 3)
    bm = _rows(256, rows)
    return Launch(bm, _keys(64, block), 8 if bm > 128 else 4, 5, tma=True)


def query_gradient(
    rows: int, block: int, width: int, itemsize: int, device: torch.device
) -> Launch:
    if itemsize > 2 or width > 128:
        return Launch(_rows(32, rows), _keys(32, block), 8, 1)
    if not has_tma(device):
        return Launch(_rows(64, rows), _keys(64, block), 4, 2)
    return Launch(_rows(64, rows), _keys(64, block), 4, 4, tma=True)


def key_gradient(tile: int, block: int, width: int, itemsize: int, device: torch.device) -> Launch:
    """rows: queries of one head per step, a divisor of R. keys: C, which a program owns."""
    rows = 64
    while tile % rows:
        rows //= 2
    assert rows >= 16, "query tiles are multiples of 16"
    if itemsize > 2 or width > 128:
        return Launch(16 if itemsize > 2 else 32, block, 8, 1)
    if not has_tma(device):
        return Launch(min(rows, 32), block, 4 if block <= 64 else 8, 2)
    return Launch(rows, block, 4 if block <= 64 else 8, 3, tma=True)


ROWS_PER_SEGMENT = 16384  # query rows (of one key-value head) that one program may walk
