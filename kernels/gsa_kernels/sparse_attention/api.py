"""sparse_attention(): out and log-sum-exp of softmax attention restricted to a Selection.

    out[t] = sum_{s in S_t} softmax_s(q[t] . k[s] * scale + bias[t, s]) v[s]

Legend: B batch, T queries, S keys, H query heads, K key-value heads, E head width, Q query tiles,
N selected slots, Hs selection heads (1 or K).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gsa_kernels.dispatch import resolve, triton_reason
from gsa_kernels.selection import Selection


@dataclass(frozen=True)
class AttentionResult:
    """out_BTHE; lse_BTH (float32, natural log; None unless asked for); mass_BHQN: attention
    probability on each selected block, averaged over the tile's queries and the heads that share
    the selection (None unless asked for; carries no gradient)."""

    out_BTHE: Tensor
    lse_BTH: Tensor | None = None
    mass_BHQN: Tensor | None = None


def implementations(device: torch.device) -> dict[str, str]:
    """Each implementation with "" if it runs on this device, else the reason why not."""
    return {
        "triton": triton_reason(device) or "this version has no Triton kernel for it yet",
        "eager": "",
        "reference": "",
    }


def choose(impl: str, device: torch.device) -> tuple[str, str]:
    """(implementation, reason) for a request; ValueError if the one named cannot run."""
    available = implementations(device)
    name = resolve("sparse attention", impl, device, available)
    if impl != "auto":
        return name, "asked for"
    return name, f"chunked PyTorch, because {available['triton']}" if name == "eager" else ""


def sparse_attention(
    q_BTHE: Tensor,
    k_BSKE: Tensor,
    v_BSKE: Tensor,
    selection: Selection,
    *,
    bias_BHQN: Tensor | None = None,
    scale: float | None = None,
    need_lse: bool = False,
    need_mass: bool = False,
    impl: str = "auto",
) -> AttentionResult:
    """Attend the selected keys. Gradients reach q, k, v and bias_BHQN.

    bias_BHQN (natural-log units, [B, Hs, Q, N]) is added to the logits of the selected blocks,
    the same for the C keys of a block and the R queries of a tile. scale defaults to 1/sqrt(E).
    Raises ValueError on shapes that do not fit the selection.
    """
    from . import eager, reference

    queries, heads, width = q_BTHE.shape[1:]
    kv_heads = k_BSKE.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key-value heads")
    if k_BSKE.shape != v_BSKE.shape or k_BSKE.shape[3] != width:
        raise ValueError(f"keys {tuple(k_BSKE.shape)} and values {tuple(v_BSKE.shape)} differ")
    if (queries, k_BSKE.shape[1]) != (selection.n_queries, selection.n_keys):
        raise ValueError(
            f"the selection is for {selection.n_queries} queries and {selection.n_keys} keys, "
            f"not {queries} and {k_BSKE.shape[1]}"
        )
    if selection.blocks_BHQN.shape[1] not in (1, kv_heads):
        raise ValueError(
            f"a selection has 1 or {kv_heads} heads, not {selection.blocks_BHQN.shape[1]}"
        )
    if bias_BHQN is not None and bias_BHQN.shape != selection.blocks_BHQN.shape:
        raise ValueError("the bias must have one entry for each slot of the selection")
    scale = width**-0.5 if scale is None else scale
    name, _ = choose(impl, q_BTHE.device)
    run = reference.attend if name == "reference" else eager.attend
    return run(q_BTHE, k_BSKE, v_BSKE, selection, bias_BHQN, scale, need_lse, need_mass)
