"""The record of attention=moba. Listing plugins imports this file, so no torch here."""

from dataclasses import dataclass
from typing import Any

from gsa_platform import Component, Trial, hookimpl
from gsa_platform.errors import UserError

GSA_PLUGIN_API = (1, 0)


@dataclass
class MobaConfig:
    name: str = "moba"
    block_size: int = 512  # keys per block
    top_k: int = 3  # blocks that a query attends, its own included


@hookimpl
def gsa_register_attention() -> Component:
    return Component(
        "moba",
        "acme_attn.moba:MobaAttention",
        MobaConfig,
        "Each query and head attends its own block and the k - 1 nearest (MoBA, arXiv 2502.13189)",
        trial=Trial(small={"block_size": 8, "top_k": 3}, dense={"top_k": 1000}),
    )


@hookimpl
def gsa_validate(config: Any) -> None:
    """Refuse sizes that cannot work before anything is built."""
    if config.attention.name != "moba":
        return
    for key in ("block_size", "top_k"):
        if config.attention[key] < 1:
            raise UserError(f"attention.{key}={config.attention[key]}: type 1 or more.")
