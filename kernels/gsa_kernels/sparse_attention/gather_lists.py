"""Lists for query gathering: a program takes a key block and queries that chose it.

Queries go in chunks, so that what is written for each (query, slot) stays small. All chunks are
listed in one call, as if they were sequences of a batch; the host never waits. The order of the
queries of a block is not defined: their sums, dk and dv, may differ in the last bits.

Legend: B batch, T queries, HS selection heads, N slots of a query, X chunks, L list entries of a
chunk, M items of a chunk.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gsa_kernels.selection import Selection, SelectionSpec
from gsa_kernels.sizes import ceil_div

from .triton_split import split
from .triton_union import UNITED


@dataclass(frozen=True)
class GatherLists:
    """queries [B X, HS, L]: queries of a chunk, numbered from its first, by the key block that
    they chose. entries [B X, HS, size, N]: where in it each choice is, -1 past the end of a
    query's list. items [B X, HS, M, 4]: block (any where the item is empty), entries [first, last)
    and 0, longest first. All int32.
    """

    queries: Tensor
    entries: Tensor
    items: Tensor
    size: int
    chunks: int


def gather_lists(selection: Selection, size: int, longest: int) -> GatherLists:
    """Lists of the chosen blocks, not of sinks and windows, for chunks of `size` queries. An item
    holds at most `longest` queries. Needs R = 1."""
    spec, blocks = selection.spec, selection.blocks_BHQN
    chunks = ceil_div(selection.n_queries, size)
    blocks = F.pad(blocks, (0, 0, 0, chunks * size - selection.n_queries), value=-1)
    blocks = blocks.unflatten(2, (chunks, size)).transpose(1, 2).flatten(0, 1).contiguous()
    # Without sinks, and so without documents, it does not matter where a chunk lies.
    plain = SelectionSpec(spec.key_block, 1, heads=spec.heads)
    chunk = Selection(plain, blocks, size, selection.n_keys)
    found = split(chunk, size, UNITED + 1, longest, False, False)  # no choice is near
    items = found.items_BHQDM3[:, :, 0, 0]
    unused = torch.arange(items.shape[2], device=blocks.device) >= found.used_BHQD[:, :, 0]
    items = items.masked_fill(unused[..., None], 0)
    order = (items[..., 2] - items[..., 1]).argsort(-1, descending=True)
    items = F.pad(items.gather(2, order[..., None].expand_as(items)), (0, 1))
    queries = found.places_BHL // blocks.shape[3]
    return GatherLists(queries, found.entries_BHTN, items, size, chunks)
