"""Operations of gated sparse attention: scoring, selection, sparse attention, indexer loss.

Each operation is a folder: `api.py` (public, validates and dispatches), `reference.py` (the
readable oracle) and its implementations. Nothing here imports the platform.
"""

from .selection import Selection, SelectionSpec, TileLayout, tile_layout

__all__ = ["Selection", "SelectionSpec", "TileLayout", "tile_layout"]
