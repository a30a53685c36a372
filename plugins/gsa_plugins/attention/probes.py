"""What diagnostics see of attentions that take no Selection."""

import torch
from torch import Tensor

from gsa_kernels.attention_mass import probe
from gsa_kernels.selection import Selection, SelectionSpec, tile_layout
from gsa_platform.contracts import Sequence

from ..dense import PROBED_TILES, spread

_ROWS = 64  # query rows looked at together


@torch.compiler.disable
def probe_dense(q_BTHE: Tensor, k_BSKE: Tensor, seq: Sequence) -> dict[str, Tensor]:
    """Attention.probe where every causal key is attended."""
    spec = SelectionSpec(_ROWS, _ROWS, _ROWS, 0)
    layout = tile_layout(
        spec, q_BTHE.shape[1], k_BSKE.shape[1], seq.q_start, seq.doc_start_BS, q_BTHE.device
    )
    tiles = spread(layout.n_tiles, PROBED_TILES)
    return vars(probe(q_BTHE, k_BSKE, layout, tiles, None, seq.doc_start_BS))


@torch.compiler.disable
def probe_window(
    q_BTHE: Tensor, k_BSKE: Tensor, seq: Sequence, window: int, sinks: int = 0
) -> dict[str, Tensor]:
    """Attention.probe where the window and the sinks are attended."""
    batch, queries = q_BTHE.shape[:2]
    chosen = window_selection(window, sinks, seq, batch, queries, q_BTHE.device)
    tiles = spread(queries, _ROWS)
    return vars(probe(q_BTHE, k_BSKE, chosen.layout, tiles, chosen, seq.doc_start_BS))


def window_selection(
    window: int,
    sinks: int,
    seq: Sequence,
    batch: int,
    queries: int,
    device: torch.device | str | None = None,
) -> Selection:
    """A window and sinks as a Selection with C = R = 1 in which nothing was chosen."""
    blocks = torch.zeros(batch, 1, queries, 0, dtype=torch.int32, device=device)
    spec = SelectionSpec(1, 1, window, sinks)
    return Selection(spec, blocks, queries, seq.q_start + queries, seq.q_start, seq.doc_start_BS)
