"""`token` mode's attention alone, on selections whose unions have a given size.

    python experiments/speed/token_attention.py --unions 1 2 4 8 --out token.json

Each group of 16 queries draws its keys from a pool of u k keys, spread over all that lie before
its window; k is what the budget leaves beside window and sinks. Outputs and gradients are compared
with the float64 reference first. `owned` is the backward that owns key blocks (deterministic),
`atomic` the default; `unions` is the time to unite alone, which forward and backward each contain.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gsa_kernels.bench.timing import environment, milliseconds, peak_bytes
from gsa_kernels.selection import Selection, SelectionSpec
from gsa_kernels.sparse_attention import sparse_attention

SPEC = SelectionSpec(1, 1, window=128, sinks=64)
GROUP = 16


def drawn(tokens: int, budget: int, inflation: float, device: torch.device) -> Selection:
    """Single keys of every query; unions of 16 neighbours hold about `inflation` times as many."""
    slots = SPEC.max_blocks(budget, tokens)
    pool = max(slots, int(slots * inflation))
    generator = torch.Generator(device).manual_seed(0)
    blocks = torch.empty(tokens, slots, dtype=torch.int32, device=device)
    place = torch.arange(pool, device=device)
    for first in range(0, tokens, GROUP * 64):
        query = torch.arange(first, min(first + GROUP * 64, tokens), device=device)
        # Keys a whole group may choose: after the sinks, before the first query's window.
        room = (query // GROUP * GROUP - SPEC.window + 1 - SPEC.sinks).clamp_min(0)[:, None]
        groups = -(-len(query) // GROUP)
        jitter = torch.rand(groups, pool, generator=generator, device=device)
        jitter = jitter.repeat_interleave(GROUP, 0)[: len(query)]
        low, high = place * room // pool, (place + 1) * room // pool
        key = SPEC.sinks + low + (jitter * (high - low)).long()
        rank = torch.rand(len(query), pool, generator=generator, device=device)
        rank = rank.masked_fill(high == low, -1)
        best = rank.topk(slots, -1)
        chosen = key.gather(-1, best.indices).masked_fill(best.values < 0, tokens)
        chosen = chosen.sort(-1).values
        blocks[query] = chosen.masked_fill(chosen == tokens, -1).to(torch.int32)
    return Selection(SPEC, blocks[None, None], tokens, tokens)


def inputs(args: argparse.Namespace, tokens: int, kv_heads: int) -> list[Tensor]:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    heads = (args.heads, kv_heads, kv_heads)
    return [
        torch.randn(1, tokens, h, args.head_dim, device=device).to(dtype).requires_grad_()
        for h in heads
    ]


def verify(args: argparse.Namespace, kv_heads: int) -> dict[str, float]:
    """Largest error over that of the low-precision reference; AssertionError above 2."""
    low = inputs(args, 500, kv_heads)
    selection = drawn(500, 300, 2.0, low[0].device)
    found: dict[str, list[Tensor]] = {}
    for name, impl, dtype, owned in (
        ("exact", "reference", torch.float64, False),
        ("low", "reference", low[0].dtype, False),
        ("atomic", args.impl, low[0].dtype, False),
        ("owned", args.impl, low[0].dtype, True),
    ):
        leaves = [x.detach().to(dtype).requires_grad_() for x in low]
        bias = torch.linspace(-1, 1, selection.blocks_BHQN.numel(), device=low[0].device)
        bias = bias.to(dtype).view(selection.blocks_BHQN.shape).requires_grad_()
        got = sparse_attention(
            *leaves, selection, bias_BHQN=bias, need_mass=True, impl=impl, deterministic=owned
        )
        grads = torch.autograd.grad(got.out_BTHE.double().sin().sum(), (*leaves, bias))
        assert got.mass_BHQN is not None
        found[name] = [x.detach().double() for x in (got.out_BTHE, got.mass_BHQN, *grads)]
    ratios = {}
    for way in ("atomic", "owned"):
        for i, name in enumerate(("out", "mass", "dq", "dk", "dv", "dbias")):
            exact = found["exact"][i]
            error, allowed = ((found[n][i] - exact).norm() for n in (way, "low"))
            floor = 2 * torch.finfo(torch.float32).eps * exact.norm()
            ratio = float(error / (allowed + floor))
            assert ratio <= 2, f"{name} ({way}) is wrong by {ratio:.1f} x the low-precision error"
            ratios[f"{name}_{way}"] = round(ratio, 3)
    return ratios


def dense(tensors: list[Tensor], device: torch.device) -> dict[str, float]:
    """Milliseconds of causal SDPA, cuDNN's where there is a GPU."""
    q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in tensors)
    backend = SDPBackend.CUDNN_ATTENTION if device.type == "cuda" else SDPBackend.FLASH_ATTENTION
    dout = torch.randn_like(q)

    def run() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    with sdpa_kernel([backend]):
        with torch.no_grad():
            forward = milliseconds(run, device)
        both = milliseconds(lambda: torch.autograd.grad(run(), (q, k, v), dout), device)
    return {"dense_forward_ms": forward, "dense_forward_backward_ms": both}


def record(
    args: argparse.Namespace, tensors: list[Tensor], tokens: int, inflation: float
) -> dict[str, Any]:
    q, k, v = tensors
    device, dout = q.device, torch.randn_like(q)
    selection = drawn(tokens, args.k, inflation, device)
    row: dict[str, Any] = {"tokens": tokens, "kv_heads": k.shape[2], "asked": inflation}

    def note(name: str, value: float) -> None:
        row[name] = value
        print(f"  {name} {value:,.2f}", flush=True)

    def attend(mass: bool = False, owned: bool = False) -> Any:
        return sparse_attention(
            q, k, v, selection, need_mass=mass, impl=args.impl, deterministic=owned
        )

    def both(owned: bool) -> None:
        torch.autograd.grad(attend(owned=owned).out_BTHE, tensors, dout)

    with torch.no_grad():
        if device.type == "cuda":
            from gsa_kernels.sparse_attention.triton_union import unite

            counts = unite(selection, None, False).counts_BHU
            note("union_keys", float(counts[..., counts.shape[-1] // 2 :].float().mean()))
            note("unions_ms", milliseconds(lambda: unite(selection, None, False), device))
        note("forward_ms", milliseconds(attend, device))
        note("forward_mass_ms", milliseconds(lambda: attend(mass=True), device))
    note("atomic_forward_backward_ms", milliseconds(lambda: both(False), device))
    note("extra_bytes", peak_bytes(lambda: both(False), device))
    out = attend().out_BTHE
    gradients = partial(torch.autograd.grad, out, tensors, dout, retain_graph=True)
    note("backward_extra_over_q", peak_bytes(gradients, device) / (q.numel() * q.element_size()))
    note("owned_forward_backward_ms", milliseconds(lambda: both(True), device))
    return row


def main() -> None:
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path)
    p.add_argument("--device", default="cuda" if cuda else "cpu")
    p.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    p.add_argument("--impl", default="triton" if cuda else "eager")
    p.add_argument("--lengths", type=int, nargs="+", default=[131072] if cuda else [2048])
    p.add_argument("--unions", type=float, nargs="+", default=[1, 2, 4, 8])
    p.add_argument("--heads", type=int, default=16 if cuda else 4)
    p.add_argument("--kv-heads", type=int, nargs="+", default=[4] if cuda else [2])
    p.add_argument("--head-dim", type=int, default=128 if cuda else 32)
    p.add_argument("--k", type=int, default=2048 if cuda else 512)
    args = p.parse_args()
    torch.manual_seed(0)
    device = torch.device(args.device)
    report: dict[str, Any] = environment(device)
    report["error_over_low_precision"] = {k: verify(args, k) for k in args.kv_heads}
    print(json.dumps(report), flush=True)
    report["records"] = []
    for tokens in args.lengths:
        for kv_heads in args.kv_heads:
            tensors = inputs(args, tokens, kv_heads)
            base = dense(tensors, device)
            for inflation in args.unions:
                print(
                    f"{tokens:,} tokens, {kv_heads} kv heads, unions of {inflation:g} k",
                    flush=True,
                )
                report["records"].append(record(args, tensors, tokens, inflation) | base)
                if args.out:
                    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
