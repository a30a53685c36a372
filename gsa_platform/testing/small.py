"""Settings by their usual names that make a component's choices matter within 100 tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WINDOW, SINKS = 8, 4
# Granularities to try per mode, finest first; 0 leaves the component's default.
GRANULARITIES = {
    "token": ((0, 0),),
    "block": ((16, 0), (32, 0), (64, 0), (128, 0), (0, 0)),
    "tile": ((8, 16), (16, 16), (64, 64), (128, 64), (128, 128), (0, 0)),
}
BLOCK_OF_DEFAULT = {"token": 1}  # any other mode: 64


@dataclass(frozen=True)
class Sizes:
    """Keys chosen together and queries sharing a choice, and the budget that goes with them."""

    mode: str = ""
    key_block: int = 0
    query_tile: int = 0

    @property
    def block(self) -> int:
        return self.key_block or BLOCK_OF_DEFAULT.get(self.mode, 64 if self.mode else 1)

    @property
    def forced(self) -> int:
        """Keys that window and sinks take from a budget."""
        return WINDOW + -(-SINKS // self.block) * self.block

    def keys(self, chosen: int) -> int:
        """A budget for `chosen` blocks beside what is forced, a multiple of the block."""
        return max(32, -(-(self.forced + chosen * self.block) // self.block) * self.block)

    @property
    def length(self) -> int:
        """Tokens of a test sequence: about 1.6 budgets, and never a multiple of anything."""
        return max(100, self.keys(2) * 8 // 5 + 3 if self.keys(2) > 64 else 100)

    def values(self, slot: str) -> dict[str, Any]:
        """Small values of a slot's usual setting names."""
        if slot == "attention":
            return {"key_block": self.key_block, "query_tile": self.query_tile}
        if slot == "sparsity":
            low = -(-self.forced // self.block) * self.block
            k = self.keys(2)
            return {
                "k": k,
                "k_min": min(low, k),
                "k_max": k + self.block * max(1, 16 // self.block),
                "window": WINDOW,
                "sinks": SINKS,
            }
        return {"indexer": {"heads": 4, "dim": 8}, "objective": {"dense_rows": 2}}.get(slot, {})


def candidates(mode: str, given: Mapping[str, Any]) -> list[Sizes]:
    """Sizes to try for a mode, finest first; what was given is kept."""
    if not mode:
        return [Sizes()]
    out = []
    for block, tile in GRANULARITIES.get(mode, ((0, 0),)):
        named = [given.get(key) for key in ("key_block", "query_tile")]
        if not all(value is None or isinstance(value, int) for value in named):
            return [Sizes(mode)]  # composing refuses it, in its own words
        sizes = Sizes(mode, named[0] or block, named[1] or tile)
        if sizes not in out:
            out.append(sizes)
    return out


def fitting(config: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values whose names are fields of a config dataclass."""
    names = {f.name for f in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if name in names}
