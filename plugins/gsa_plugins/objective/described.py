"""How an objective's scores and their gradients are computed, for the log."""

import torch

from gsa_kernels.indexer_loss.api import choose
from gsa_kernels.selection import SelectionSpec
from gsa_platform.contracts import Indexer

from ..indexer.base import BlockIndexer


def described(device_type: str, spec: SelectionSpec, indexer: Indexer) -> str:
    """One line; empty for an indexer whose factors are not known before it runs."""
    factors = indexer.outline(spec, spec.key_block) if isinstance(indexer, BlockIndexer) else None
    if factors is None:
        return ""
    name, why = choose(factors, spec, torch.device(device_type))
    return f"impl {name} ({why})"
