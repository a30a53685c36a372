"""When single keys are chosen from lists of some scores (triton_filter.py), and how long those."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gsa_kernels.index_score.api import IndexFactors
from gsa_kernels.index_score.fp8 import product_dtype
from gsa_kernels.selection import SelectionSpec
from gsa_kernels.sizes import padded

EVERY = 16  # of so many keys one is a sample, where no row has more samples than SAMPLES
SAMPLES = 32768
FEWEST = 1024  # places of a list
MOST = 16384
HELD = 1 << 28  # bytes of lists, or of the sample's scores, at a time
ROWS = 1024  # with fewer the kernels do not fill a GPU
CHANNELS = 512  # of all heads' queries of a row: they stay in shared memory


@dataclass(frozen=True)
class Plan:
    places: int  # scores that are listed per row, at most
    stride: int  # keys per sample
    rows: int  # of a list at a time


def streams(factors: IndexFactors, spec: SelectionSpec) -> bool:
    """Whether kernels walk single keys with a row's queries held; the number of rows or keys has
    no say, so that decoding takes the statistics that a whole sequence does."""
    heads, channels = factors.q_BTJI.shape[2:]
    dtype = factors.q_BTJI.dtype
    if spec.key_block > 1 or dtype.itemsize != 2:
        return False
    if dtype != product_dtype(factors.q_BTJI, factors.k_BSI):
        return False
    return heads // factors.heads * padded(channels) <= CHANNELS


def plan(
    factors: IndexFactors, spec: SelectionSpec, width: int, tiles: int, longest: int
) -> Plan | None:
    """How to choose `width` keys at most of rows of more than `longest`; None: as blocks are."""
    keys, lists = factors.k_BSI.shape[1], factors.q_BTJI.shape[0] * factors.heads
    if keys <= longest or not width or tiles * lists < ROWS or not streams(factors, spec):
        return None
    stride = EVERY
    while keys // stride > SAMPLES:
        stride *= 2
    mean, spread = width / stride, 1 - 1 / stride
    rank = mean + 5.5 * math.sqrt(mean * spread) + 4  # as triton_filter.sample_rank
    # A list's length has the spread of the samples above its threshold, of which there may be a
    # sixteenth too many.
    need = stride * (rank * 17 / 16 + 5 * math.sqrt(rank * spread))
    places = max(FEWEST, 1 << math.ceil(math.log2(need)))
    if places > MOST:
        return None
    rows = HELD // (max(8 * places, 4 * (keys // stride)) * lists)
    return Plan(places, stride, max(1, rows))


def sample_of(k_BSI: Tensor, stride: int) -> Tensor:
    """[B, S // stride, 1, I]: of every `stride` keys one, not always the same, so that no period
    of the text meets it each time."""
    n = torch.arange(k_BSI.shape[1] // stride, device=k_BSI.device)
    return k_BSI[:, n * stride + (n * 40503 >> 7) % stride][:, :, None]
