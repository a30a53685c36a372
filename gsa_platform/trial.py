"""What the contract kit must be told to try a component on a hundred tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Trial:
    """Settings under which ``gsa_platform.testing`` tries a component; all are optional.

    small: settings that make its choices matter within 100 tokens. The usual names (key_block,
    query_tile, k, k_min, k_max, window, sinks, heads, dim) are made small without being told.
    dense: settings, on top of ``small``, under which nothing is pruned: it must then equal dense
    attention. None: there are none. reference: settings that choose a slow reference, which
    outputs and gradients must equal. None: gradients are compared with finite differences.
    align: a document that begins at a multiple of it must equal the document alone.
    """

    small: Mapping[str, Any] = field(default_factory=dict)
    dense: Mapping[str, Any] | None = None
    reference: Mapping[str, Any] | None = None
    align: int = 64
