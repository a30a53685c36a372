"""Other implementations of the same work: softmax attention over the same Selection.

Each is timed on q, k, v alone, as `attend_ms` of a record is, and only if its output and
gradients are ours; one that cannot run says why. They need more or less of:

    flex         FlexAttention with cells of 128 x 128, its mask made at every call, as in training
    flex_kernel  the same with the mask given
    fla          the selected branch of NSA (flash-linear-attention), one list of blocks per query
    attn_gym     attention-gym: refused, since it reads keys and values from one tensor
    xformers     BlockSparseTensor, plain PyTorch over copied cells
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gsa_kernels.bench.case import Case, Shape
from gsa_kernels.bench.timing import milliseconds, peak_bytes, version
from gsa_kernels.selection import Selection
from gsa_kernels.sparse_attention import sparse_attention
from gsa_platform.contracts import LayerDims, Sequence

from ..attention import fa3, flex, xformers_ops
from ..attention.xformers_dense import XformersAttention
from ..attention.xformers_sparse import XformersSparseAttention
from ..configs import FlexConfig, XformersConfig, XformersSparseConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# Relative difference of two results in one precision: a few roundings of the inputs.
_ALLOWED = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
CELLS = 128


def dense_others(shape: Shape) -> dict[str, Attend]:
    """Dense causal attention by other packages than PyTorch; called, each may refuse."""

    def flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if why := fa3.reason(q.device):
            raise ValueError(why)
        return fa3.attend(q, k, v, Sequence(q_start=k.shape[1] - q.shape[1]))

    def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if why := _missing("xformers") or xformers_ops.reason(q.device.type):
            raise ValueError(why)
        layer = XformersAttention(XformersConfig(window=0), _dims(shape))
        return layer(q, k, v, None, Sequence(q_start=k.shape[1] - q.shape[1])).out_BTHE

    return {"fa3": flash3, "xformers": xformers}


def beside(
    shape: Shape, case: Case, selection: Selection, backward: bool, names: list[str]
) -> dict[str, dict[str, Any]]:
    """By name: version, ms, error (largest relative difference from ours) and peak_extra_bytes,
    or the reason why there is no time."""
    found: dict[str, dict[str, Any]] = {}
    if not names:
        return found
    q, k, v = (x.detach().requires_grad_(backward) for x in (case.q, case.k, case.gated_values))
    dout = torch.randn_like(q)

    def results(attend: Attend) -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            out = attend(q, k, v)
            grads = torch.autograd.grad(out, (q, k, v), dout) if backward else ()
        return [out.detach(), *grads]

    ours = results(lambda q, k, v: sparse_attention(q, k, v, selection, impl=case.impl).out_BTHE)
    for name in names:
        row: dict[str, Any] = {}
        found[name] = row
        try:
            row["version"], attend = MAKERS[name](shape, selection, backward)
            row["error"] = max(
                float((a.float() - b.float()).norm() / b.float().norm())
                for a, b in zip(results(attend), ours, strict=True)
            )
            if not row["error"] <= _ALLOWED[q.dtype]:
                row["reason"] = f"its result differs from ours by {row['error']:.1e}: not timed"
                continue
            call = partial(results, attend)
            row["ms"] = milliseconds(call, q.device)
            row["peak_extra_bytes"] = peak_bytes(call, q.device)
        except Exception as error:  # a backend that cannot run is a result, not the end
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            row["reason"] = kind + str(error).strip().partition("\n")[0][:300]
        if q.device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _dims(shape: Shape) -> LayerDims:
    width = shape.heads * shape.head_dim
    return LayerDims(width, shape.heads, shape.kv_heads, shape.head_dim, shape.seq_len)


def _missing(module: str, package: str = "") -> str:
    if importlib.util.find_spec(module) is None:
        return f"the package {package or module} is not installed"
    return ""


def _component(layer: Any, selection: Selection) -> Attend:
    return lambda q, k, v: layer(q, k, v, selection, Sequence()).out_BTHE


def _flex(shape: Shape, selection: Selection, backward: bool) -> tuple[str, Attend]:
    spec = shape.spec
    config = FlexConfig(
        mode=shape.mode, key_block=spec.key_block, query_tile=spec.query_tile, block=CELLS
    )
    layer = flex.FlexSelectedAttention(config, _dims(shape))
    return torch.__version__, _component(layer, selection)


def _flex_kernel(shape: Shape, selection: Selection, backward: bool) -> tuple[str, Attend]:
    if shape.device.type == "cpu":
        raise ValueError("FlexAttention's kernel has no backward on a CPU; see flex")
    mask = selection.to_block_mask(CELLS, heads=shape.heads)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flex.attend_compiled(q, k, v, mask, shape.head_dim**-0.5).transpose(1, 2)

    return torch.__version__, attend


def _fla(shape: Shape, selection: Selection, backward: bool) -> tuple[str, Attend]:
    if why := _missing("fla", "flash-linear-attention"):
        raise ValueError(why)
    group = shape.heads // shape.kv_heads
    if group < 16 or group & (group - 1):
        raise ValueError(
            f"its kernels need 16, 32, .. query heads per key-value head, not {group}: "
            "try --kv-heads 1"
        )
    if shape.device.type != "cuda":
        raise ValueError("needs a CUDA device")
    from fla.ops.nsa.parallel import ParallelNSAFunction

    indices, counts = query_lists(selection, shape.kv_heads)
    c, scale = shape.spec.key_block, shape.head_dim**-0.5

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = ParallelNSAFunction.apply(q, k, v, indices, counts, c, scale, None)
        assert isinstance(out, Tensor)
        return out

    return version("flash-linear-attention"), attend


def query_lists(selection: Selection, kv_heads: int) -> tuple[Tensor, Tensor]:
    """(indices [B, T, K, M], counts [B, T, K]), int64: every block of each query, sinks and window
    too, with those that count first. Window blocks after the query are left to a causal mask."""
    blocks, valid = selection.slots(slice(None))
    order = valid.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    blocks = blocks.masked_fill(~valid, -1).gather(-1, order)
    r, device = selection.spec.query_tile, blocks.device
    tile = torch.arange(selection.q_start, selection.q_start + selection.n_queries, device=device)
    tile = tile // r - selection.q_start // r
    counts = valid.sum(-1)[:, :, tile].transpose(1, 2)
    most = int(counts.max())
    indices = blocks[:, :, tile, :most].transpose(1, 2)
    shape = (*indices.shape[:2], kv_heads)
    return indices.expand(*shape, most).contiguous(), counts.expand(shape).contiguous()


def _attn_gym(shape: Shape, selection: Selection, backward: bool) -> tuple[str, Attend]:
    raise ValueError(
        "its gathered attention reads keys and values from one tensor (as in latent attention): "
        "not this work"
    )


def _xformers(shape: Shape, selection: Selection, backward: bool) -> tuple[str, Attend]:
    if why := _missing("xformers"):
        raise ValueError(why)
    if shape.mode != "tile":
        raise ValueError("its square cells need tiles of 16 queries or more: --mode tile")
    spec = shape.spec
    config = XformersSparseConfig(key_block=spec.key_block, query_tile=spec.query_tile)
    layer = XformersSparseAttention(config, _dims(shape))
    return version("xformers"), _component(layer, selection)


MAKERS: dict[str, Callable[[Shape, Selection, bool], tuple[str, Attend]]] = {
    "flex": _flex,
    "flex_kernel": _flex_kernel,
    "fla": _fla,
    "attn_gym": _attn_gym,
    "xformers": _xformers,
}
