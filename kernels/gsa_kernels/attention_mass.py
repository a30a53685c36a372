"""Dense attention seen from a few query tiles: what a selection ought to cover, and does.

The cost of a tile of R queries against all keys is linear in T.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import triton_reason
from .selection import Selection, SelectionSpec, TileLayout


@torch.no_grad()
def tile_probability(
    q_BTHE: Tensor,
    k_BSKE: Tensor,
    layout: TileLayout,
    tile: int,
    doc_start_BS: Tensor | None = None,
    mask_BHRS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(probability [B, K, G, rows, S'], positions [rows]) of a tile's queries over keys 0 .. S'-1.

    S' is the tile's last query + 1. mask_BHRS restricts the softmax to a selection.
    """
    anchor, r = layout.anchor(tile), layout.spec.query_tile
    low, high = max(anchor, layout.q_start), min(anchor + r, layout.q_start + layout.n_queries)
    position = torch.arange(low, high, device=q_BTHE.device)
    batch, _, heads, width = q_BTHE.shape
    kv_heads = k_BSKE.shape[2]
    dtype = torch.float64 if q_BTHE.dtype == torch.float64 else torch.float32
    q = q_BTHE[:, low - layout.q_start : high - layout.q_start].to(dtype) * width**-0.5
    q = q.view(batch, -1, kv_heads, heads // kv_heads, width).permute(0, 2, 3, 1, 4)
    k = k_BSKE[:, :high].to(dtype).permute(0, 2, 3, 1)[:, :, None]
    with torch.autocast(q.device.type, enabled=False):  # a target of 8 bits would be noise
        logits = q @ k
    key = torch.arange(high, device=q.device)
    keep = (key <= position[:, None])[None, None]
    if doc_start_BS is not None:
        keep = keep & (key >= doc_start_BS[:, position, None])[:, None]
    if mask_BHRS is not None:
        keep = keep & mask_BHRS
    return logits.masked_fill_(~keep[:, :, None], -torch.inf).softmax(-1), position


@torch.no_grad()
def dense_mass(
    q_BTHE: Tensor,
    k_BSKE: Tensor,
    layout: TileLayout,
    tile: int,
    doc_start_BS: Tensor | None = None,
    selection_heads: int = 1,
) -> Tensor:
    """[B, Hs, blocks] full attention on each key block, mean over the tile's queries and heads."""
    if not no_kernel(q_BTHE):
        number = torch.full((1,), tile, device=q_BTHE.device)
        mass = dense_masses(
            q_BTHE, k_BSKE, layout.spec, number, layout.q_start, doc_start_BS, selection_heads
        )
        last = min(layout.anchor(tile) + layout.spec.query_tile, layout.q_start + layout.n_queries)
        return mass[:, :, 0, : -(-last // layout.spec.key_block)]
    p, _ = tile_probability(q_BTHE, k_BSKE, layout, tile, doc_start_BS)
    rows = p.mean((2, 3))
    if selection_heads == 1:
        rows = rows.mean(1, keepdim=True)
    c = layout.spec.key_block
    pad = -rows.shape[-1] % c
    return torch.nn.functional.pad(rows, (0, pad)).unflatten(-1, (-1, c)).sum(-1)


def no_kernel(q_BTHE: Tensor) -> str:
    """Why `dense_masses` cannot take these queries; empty where it can."""
    if q_BTHE.dtype == torch.float64:
        return "the kernels compute in float32 at most"
    if q_BTHE.shape[3] > 256:
        return f"the kernels take heads of up to 256 channels, not {q_BTHE.shape[3]}"
    return triton_reason(q_BTHE.device)


@torch.no_grad()
def dense_masses(
    q_BTHE: Tensor,
    k_BSKE: Tensor,
    spec: SelectionSpec,
    tiles: Tensor,
    q_start: int = 0,
    doc_start_BS: Tensor | None = None,
    selection_heads: int = 1,
) -> Tensor:
    """[B, Hs, n, blocks] float32: `dense_mass` of n tiles at once, by kernels; 0 beyond a tile.

    tiles: their numbers, on the device of q. Nothing waits for the device.
    """
    from .indexer_loss import ops

    docs = None if doc_start_BS is None else doc_start_BS.contiguous()
    sizes = [spec.key_block, spec.query_tile, q_start, selection_heads]
    return ops.block_mass(q_BTHE.contiguous(), k_BSKE.contiguous(), tiles, docs, sizes)


@dataclass(frozen=True)
class Probe:
    """What a few query tiles of one layer saw; every field is float64 and one-dimensional.

    Per query row, averaged over heads: position (within its document), first_sparse (attention on
    the document's first token), first_dense (the same in full attention on the same weights),
    covered (dense attention mass inside S_t, window and sinks included).
    Per tile that had to leave candidates out: possible (dense mass on the candidates), got (of
    which the selection covers), best (what as many blocks could cover), hits (chosen blocks among
    those best ones) and wanted (how many blocks there were to choose).
    """

    position: Tensor
    first_sparse: Tensor
    first_dense: Tensor
    covered: Tensor
    possible: Tensor
    got: Tensor
    best: Tensor
    hits: Tensor
    wanted: Tensor


@torch.no_grad()
def probe(
    q_BTHE: Tensor,
    k_BSKE: Tensor,
    layout: TileLayout,
    tiles: list[int],
    selection: Selection | None = None,
    doc_start_BS: Tensor | None = None,
) -> Probe:
    """Compare the attention of a few tiles with full attention on the same weights.

    Without a selection (dense attention) sparse equals dense and the tile fields are empty.
    """
    rows: dict[str, list[Tensor]] = {n: [] for n in ("position", "first_sparse", "first_dense")}
    rows["covered"] = []
    choices: dict[str, list[Tensor]] = {n: [] for n in ("possible", "got", "best", "hits")}
    choices["wanted"] = []
    for tile in tiles:
        dense, position = tile_probability(q_BTHE, k_BSKE, layout, tile, doc_start_BS)
        start = torch.zeros(dense.shape[0], len(position), dtype=torch.long, device=dense.device)
        if doc_start_BS is not None:
            start = doc_start_BS[:, position]
        pick = start[:, None, None, :, None].expand(*dense.shape[:4], 1)
        first_dense = dense.gather(-1, pick)[..., 0].mean((1, 2))
        first_sparse, covered = first_dense, torch.ones_like(first_dense)
        if selection is not None:
            mask = _tile_mask(selection, tile, dense.shape[-1])[:, :, None]
            sparse, _ = tile_probability(q_BTHE, k_BSKE, layout, tile, doc_start_BS, mask)
            first_sparse = sparse.gather(-1, pick)[..., 0].mean((1, 2))
            covered = (dense.mean(2) * mask).sum(-1).mean(1)
            _compare(choices, dense, layout, tile, selection)
        rows["position"].append(position - start)
        rows["first_sparse"].append(first_sparse)
        rows["first_dense"].append(first_dense)
        rows["covered"].append(covered)
    empty = torch.zeros(0, device=q_BTHE.device)
    fields = {
        name: torch.cat([v.double().flatten() for v in values] or [empty.double()])
        for name, values in (rows | choices).items()
    }
    return Probe(**fields)


def _compare(
    choices: dict[str, list[Tensor]],
    dense: Tensor,
    layout: TileLayout,
    tile: int,
    selection: Selection,
) -> None:
    """Append what the tile's selection covers of the dense mass on its candidates."""
    spec = layout.spec
    c = spec.key_block
    n_blocks = max(0, layout.anchor(tile) - spec.window + 1) // c
    chosen = selection.blocks_BHQN[:, :, tile].long()
    if n_blocks == 0 or chosen.shape[-1] == 0:
        return
    rows = dense.mean((2, 3))
    if chosen.shape[1] == 1:
        rows = rows.mean(1, keepdim=True)
    allowed = layout.candidates(slice(tile, tile + 1), n_blocks)
    mass = rows[..., : n_blocks * c].unflatten(-1, (-1, c)).sum(-1).double()
    mass = mass.masked_fill(~allowed.expand_as(mass), 0)
    count = (chosen >= 0).sum(-1, keepdim=True)
    # A tile that keeps every candidate shows nothing about the choice.
    real = (count[..., 0] > 0) & (allowed.sum(-1) > count[..., 0])
    width = min(chosen.shape[-1], n_blocks)
    order = mass.argsort(dim=-1, descending=True, stable=True)[..., :width]
    rank = torch.arange(width, device=mass.device) < count
    safe = chosen.clamp(0, n_blocks - 1)
    shared = torch.isin(_tagged(order, rank), _tagged(safe, chosen >= 0)) & rank
    for name, value in (
        ("possible", mass.sum(-1)),
        ("got", (mass.gather(-1, safe) * (chosen >= 0)).sum(-1)),
        ("best", (mass.gather(-1, order) * rank).sum(-1)),
        ("hits", shared.sum(-1)),
        ("wanted", count[..., 0]),
    ):
        choices[name].append(value[real])


def _tagged(blocks: Tensor, keep: Tensor) -> Tensor:
    """Block numbers made unique per (batch, head), so one isin compares all rows at once."""
    batch, heads, _ = blocks.shape
    row = torch.arange(batch * heads, device=blocks.device).view(batch, heads, 1)
    return ((row << 40) + blocks).masked_fill(~keep, -1)


def _tile_mask(selection: Selection, tile: int, n_keys: int) -> Tensor:
    """[B, Hs, n_keys] bool: keys in the tile's blocks (causal and document rules not applied)."""
    c = selection.spec.key_block
    blocks, valid = selection.slots(slice(tile, tile + 1))
    n_blocks = -(-n_keys // c)
    hit = torch.zeros(*blocks.shape[:2], n_blocks + 1, device=blocks.device)
    inside = valid[:, :, 0] & (blocks[:, :, 0] < n_blocks)
    hit.scatter_(-1, blocks[:, :, 0].masked_fill(~inside, n_blocks), 1.0)
    return hit[..., :-1].bool().repeat_interleave(c, -1)[..., :n_keys]
