"""sparse_attention(): out and log-sum-exp of softmax attention restricted to a Selection.

    out[t] = sum_{s in S_t} softmax_s(q[t] . k[s] * scale + bias[t, s]) v[s]

Legend: B batch, T queries, S keys, H query heads, K key-value heads, E head width, Q query tiles,
N selected slots, Hs selection heads (1 or K).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gsa_kernels.dispatch import resolve, triton_reason
from gsa_kernels.selection import Selection, SelectionSpec

# Up to so many queries, and where neither a gradient nor the mass is wanted, their keys are split
# over programs (triton_decode.py): tiles of queries would leave most of a GPU idle.
FEW_QUERIES = 16


@dataclass(frozen=True)
class AttentionResult:
    """out_BTHE; lse_BTH (float32, natural log; None unless asked for); mass_BHQN: attention
    probability on each selected block, averaged over the tile's queries and the heads that share
    the selection (None unless asked for; carries no gradient)."""

    out_BTHE: Tensor
    lse_BTH: Tensor | None = None
    mass_BHQN: Tensor | None = None


def implementations(
    device: torch.device,
    spec: SelectionSpec | None = None,
    width: int = 0,
    interpreted: bool = False,
) -> dict[str, str]:
    """Each implementation with "" if it runs here (for this granularity and head width E, where
    they are given), else the reason why not."""
    return {
        "triton": triton_reason(device, interpreted) or _no_kernel(spec, width),
        "eager": "",
        "reference": "",
    }


def _no_kernel(spec: SelectionSpec | None, width: int) -> str:
    if width > 256:
        return f"the kernels take heads of up to 256 channels, not {width}"
    if spec is None:
        return ""
    if spec.key_block & (spec.key_block - 1) or spec.key_block > 128:
        return f"the kernels take key blocks of 1, 2, 4 .. 128 keys, not {spec.key_block}"
    if spec.query_tile == 1 and spec.key_block >= 16 and spec.window < 16:
        # United queries share the sinks of the first: a document that starts among them must
        # have its own sinks inside the window.
        return f"the kernels need a window of 16 keys or more, not {spec.window}"
    if spec.query_tile > 1 and spec.query_tile % 16:
        return f"the kernels take query tiles of 1, 16, 32, 48 .., not {spec.query_tile}"
    return ""


def choose(
    impl: str, device: torch.device, spec: SelectionSpec | None = None, width: int = 0
) -> tuple[str, str]:
    """(implementation, reason) for a request; ValueError if the one named cannot run."""
    available = implementations(device, spec, width, interpreted=impl == "triton")
    name = resolve("sparse attention", impl, device, available)
    if impl != "auto":
        return name, "asked for"
    if name == "eager":
        return name, f"chunked PyTorch, because {available['triton']}"
    return name, "the fastest here"


def sparse_attention(
    q_BTHE: Tensor,
    k_BSKE: Tensor,
    v_BSKE: Tensor,
    selection: Selection,
    *,
    bias_BHQN: Tensor | None = None,
    gate_BTHE: Tensor | None = None,
    scale: float | None = None,
    need_lse: bool = False,
    need_mass: bool = False,
    deterministic: bool | None = None,
    impl: str = "auto",
) -> AttentionResult:
    """Attend the selected keys. Gradients reach q, k, v, bias_BHQN and gate_BTHE.

    bias_BHQN (natural-log units, [B, Hs, Q, N]) is added to the logits of the selected blocks,
    the same for the C keys of a block and the R queries of a tile. gate_BTHE (activated, one per
    channel or, [B, T, H, 1], per head) multiplies the output. scale defaults to 1/sqrt(E).
    deterministic: a backward without atomic additions, whatever they cost; by default what
    torch.use_deterministic_algorithms says.
    Raises ValueError on shapes that do not fit the selection.
    """
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
    batch = len(selection.blocks_BHQN)
    if (len(q_BTHE), len(k_BSKE)) != (batch, batch):
        raise ValueError(
            f"the selection is for a batch of {batch}, not {len(q_BTHE)} (queries) and "
            f"{len(k_BSKE)} (keys)"
        )
    if selection.blocks_BHQN.shape[1] not in (1, kv_heads):
        raise ValueError(
            f"a selection has 1 or {kv_heads} heads, not {selection.blocks_BHQN.shape[1]}"
        )
    if bias_BHQN is not None and bias_BHQN.shape != selection.blocks_BHQN.shape:
        raise ValueError("the bias must have one entry for each slot of the selection")
    if gate_BTHE is not None:
        if gate_BTHE.shape not in (q_BTHE.shape, (*q_BTHE.shape[:3], 1)):
            raise ValueError(
                f"an output gate is {tuple(q_BTHE.shape)} or {(*q_BTHE.shape[:3], 1)}, "
                f"not {tuple(gate_BTHE.shape)}"
            )
        gate_BTHE = gate_BTHE.to(q_BTHE.dtype)
    scale = width**-0.5 if scale is None else scale
    name, _ = choose(impl, q_BTHE.device, selection.spec, width)
    if name == "triton" and q_BTHE.dtype == torch.float64:
        if impl == "triton":
            raise ValueError("impl=triton computes in float32 at most: float64 needs eager")
        name = "eager"
    if name == "triton":
        tensors = (q_BTHE, k_BSKE, v_BSKE, selection, bias_BHQN, gate_BTHE)
        return _triton(*tensors, scale, need_lse, need_mass, deterministic)
    from . import eager, reference

    run = reference.attend if name == "reference" else eager.attend
    result = run(q_BTHE, k_BSKE, v_BSKE, selection, bias_BHQN, scale, need_lse, need_mass)
    if gate_BTHE is not None:
        result = replace(result, out_BTHE=result.out_BTHE * gate_BTHE)
    return result


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    bias: Tensor | None,
    gate: Tensor | None,
    scale: float,
    need_lse: bool,
    need_mass: bool,
    deterministic: bool | None,
) -> AttentionResult:
    from . import ops
    from .single_keys import single_keys

    spec, docs = selection.spec, selection.doc_start_BS
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    sizes = [spec.key_block, spec.query_tile, spec.window, spec.sinks, selection.q_start]
    learn = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, bias, gate)
    )
    q, blocks = q.contiguous(), selection.blocks_BHQN.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    docs = None if docs is None else docs.to(torch.int32).contiguous()
    gate = None if gate is None else gate.contiguous()
    if q.shape[1] <= FEW_QUERIES and not (learn or need_mass):
        out, lse = ops.decode(q, k, v, blocks, bias, docs, gate, sizes, scale)
        return AttentionResult(out, lse.transpose(1, 2) if need_lse else None)
    keys = None
    if spec.query_tile == 1 and 1 < spec.key_block < 16:
        keys = single_keys(replace(selection, doc_start_BS=docs))
        blocks, sizes = keys.selection.blocks_BHQN, [1, 1, spec.window, 0, selection.q_start]
        bias = None if bias is None else keys.spread(bias)
    k, v = k.contiguous(), v.contiguous()
    out, lse, mass, *_ = ops.forward(
        q, k, v, blocks, bias, docs, gate, sizes, scale, need_mass, learn, deterministic
    )
    if need_mass and keys is not None:
        mass = keys.summed(mass)
    return AttentionResult(
        out, lse.transpose(1, 2) if need_lse else None, mass if need_mass else None
    )
