"""The whole path of one layer's sparse attention against the fastest dense SDPA, in one process.

    python -m gsa_kernels.bench.attention --out speed.json

What is timed: scoring, selection, value gate, attention and output gate (the projections of the
indexer and of q, k, v are not); with the backward also the KL objective on the selected keys.
Before any time is taken, outputs and gradients are compared with the float64 reference.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gsa_kernels.index_score import IndexFactors
from gsa_kernels.indexer_loss.api import selected_kl
from gsa_kernels.select import select
from gsa_kernels.selection import SelectionSpec
from gsa_kernels.sparse_attention import sparse_attention

from .timing import environment, milliseconds, peak_bytes

DENSE = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
INDEX_HEADS, INDEX_WIDTH = 4, 64


@dataclass
class Case:
    """Inputs of one layer at one shape: q, k, v, both gates, index factors (all leaves)."""

    q: Tensor
    k: Tensor
    v: Tensor
    value_gate: Tensor
    output_gate: Tensor
    factors: IndexFactors
    spec: SelectionSpec
    budget: int
    impl: str

    @property
    def leaves(self) -> list[Tensor]:
        f = self.factors
        return [self.q, self.k, self.v, self.value_gate, self.output_gate, f.q_BTJI, f.k_BSI]

    def choose(self) -> Any:
        return select(self.factors, self.spec, self.budget, self.budget, self.q.shape[1]).selection

    def attend(self, selection: Any, learn: bool = False) -> tuple[Tensor, Tensor | None]:
        """(gated output, KL on the selected keys or None)."""
        result = sparse_attention(
            self.q, self.k, self.v * self.value_gate, selection, need_mass=learn, impl=self.impl
        )
        out = result.out_BTHE * self.output_gate
        if not learn:
            return out, None
        assert result.mass_BHQN is not None
        return out, selected_kl(self.factors, selection, result.mass_BHQN, "log")

    def train(self, dout: Tensor) -> None:
        out, loss = self.attend(self.choose(), learn=True)
        assert loss is not None
        torch.autograd.grad([out, loss], self.leaves, [dout, torch.ones_like(loss)])


def make_case(args: argparse.Namespace, tokens: int, kv_heads: int, tile: int) -> Case:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    g = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(*shape, device=device, generator=g).to(dtype)
        return x.requires_grad_()

    def gate(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device, generator=g).to(dtype).requires_grad_()

    heads, width = args.heads, args.head_dim
    index_q = draw(1, tokens, INDEX_HEADS, INDEX_WIDTH)
    if args.inputs == "smooth":
        index_q = _smooth(index_q.detach(), args.memory).requires_grad_()
    factors = IndexFactors(
        index_q,
        draw(1, tokens, INDEX_WIDTH),
        torch.rand(1, tokens, INDEX_HEADS, device=device, generator=g).to(dtype),
        torch.zeros(INDEX_HEADS, device=device, dtype=dtype),
        INDEX_WIDTH**-0.5,
    )
    return Case(
        draw(1, tokens, heads, width),
        draw(1, tokens, kv_heads, width),
        draw(1, tokens, kv_heads, width),
        gate(1, tokens, kv_heads, width),
        gate(1, tokens, heads, width),
        factors,
        SelectionSpec(args.key_block, tile, window=128, sinks=64),
        args.k,
        args.impl,
    )


def _smooth(x_BTJI: Tensor, memory: int) -> Tensor:
    """Index queries that change slowly, as those of text do: means over `memory` positions, scaled
    back to unit variance. Neighbours then choose nearly the same keys."""
    padded = F.pad(x_BTJI.float(), (0, 0, 0, 0, memory - 1, 0))
    total = padded.cumsum(1)
    total = total[:, memory - 1 :] - F.pad(total, (0, 0, 0, 0, 1, 0))[:, : x_BTJI.shape[1]]
    return (total / memory**0.5).to(x_BTJI.dtype)


def dense_times(case: Case, backward: bool, names: list[str]) -> dict[str, float]:
    """Milliseconds of each dense backend that runs here."""
    q, k, v = (
        x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (case.q, case.k, case.v)
    )
    if q.device.type != "cuda":
        k, v = (x.detach().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        k, v = k.requires_grad_(), v.requires_grad_()
    dout = torch.randn_like(q)

    def run() -> None:
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        if backward:
            torch.autograd.grad(out, (q, k, v), dout)

    found = {}
    for name in names:
        backends = [DENSE[name]] if name in DENSE else [SDPBackend.FLASH_ATTENTION]
        try:
            with sdpa_kernel(backends), torch.set_grad_enabled(backward):
                found[name] = milliseconds(run, q.device)
        except RuntimeError:
            continue  # this backend does not take this shape
    if not found:
        raise RuntimeError("no dense backend ran: choose others with --dense")
    return found


def verify(args: argparse.Namespace, tile: int, kv_heads: int) -> dict[str, float]:
    """Largest ratio of the kernel's error to the low-precision reference's, at a short length.

    Raises AssertionError above 2, the budget: no time is taken of a wrong result.
    """
    case = make_case(args, 1000, kv_heads, tile)
    case.budget = 512
    selection = case.choose()
    ratios = {}
    outs = {}
    for name, impl, dtype in (
        ("exact", "reference", torch.float64),
        ("low", "reference", case.q.dtype),
        ("got", args.impl, case.q.dtype),
    ):
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in (case.q, case.k, case.v))
        out = sparse_attention(q, k, v, selection, impl=impl).out_BTHE
        grads = torch.autograd.grad(out.double().sin().sum(), (q, k, v))
        outs[name] = [x.double() for x in (out, *grads)]
    for i, name in enumerate(("out", "dq", "dk", "dv")):
        exact = outs["exact"][i].detach()
        error, allowed = ((outs[n][i].detach() - exact).norm() for n in ("got", "low"))
        ratios[name] = float(error / allowed.clamp_min(1e-12 * float(exact.norm())))
        assert ratios[name] <= 2, (
            f"{name} is wrong by {ratios[name]:.1f} x the low-precision error"
        )
    return ratios


def bound_ms(case: Case, keys: float, passes: int, flops: float, bandwidth: float) -> float:
    """Least time of the attention by arithmetic and by bytes read once, the larger of both."""
    batch, tokens, heads, width = case.q.shape
    operations = passes * 2 * keys * width * heads * tokens * batch
    moved = sum(x.numel() * x.element_size() for x in (case.q, case.q, case.k, case.v))
    return max(operations / flops, moved * (passes / 2) / bandwidth) * 1e3


def records(
    args: argparse.Namespace, tokens: int, kv_heads: int, tile: int
) -> list[dict[str, Any]]:
    case = make_case(args, tokens, kv_heads, tile)
    device = case.q.device
    selection = case.choose()
    keys = float(selection.attended_BHT().float().mean())
    dout = torch.randn_like(case.q)
    shape = {
        "mode": args.mode,
        "C": args.key_block,
        "R": tile,
        "batch": 1,
        "seq_len": tokens,
        "heads": args.heads,
        "kv_heads": kv_heads,
        "head_dim": args.head_dim,
        "k": args.k,
        "keys_attended": keys,
        "dtype": args.dtype,
        "inputs": args.inputs,
        "impl": args.impl,
    }
    v = case.v * case.value_gate
    rows = []

    def forward() -> None:
        case.attend(case.choose())

    def only_attention() -> Tensor:
        return sparse_attention(case.q, case.k, v, selection, impl=case.impl).out_BTHE

    def attention_and_backward() -> None:
        torch.autograd.grad(only_attention(), (case.q, case.k, v), dout, retain_graph=True)

    passes: list[tuple[str, Callable[[], None], Callable[[], Any], int]] = [
        ("forward", forward, only_attention, 2),
        ("forward_backward", lambda: case.train(dout), attention_and_backward, 7),
    ]
    for name, whole, attention, products in passes:
        backward = name != "forward"
        if backward and tokens > args.longest_backward:
            continue
        dense = dense_times(case, backward, args.dense)
        best = min(dense, key=dense.__getitem__)
        with torch.set_grad_enabled(backward):
            ours = milliseconds(whole, device)
            attend = milliseconds(attention, device)
            extra = peak_bytes(attention, device)
        choose = milliseconds(case.choose, device)
        least = bound_ms(case, keys, products, args.peak_flops, args.peak_bytes_s)
        rows.append(
            {
                **shape,
                "pass": name,
                "dense_backend": best,
                "dense_ms": dense[best],
                "dense_all_ms": dense,
                "select_ms": choose,
                "attend_ms": attend,
                "ours_ms": ours,
                "ratio": dense[best] / ours,
                "attend_ratio": dense[best] / attend,
                "roofline": least / attend,
                "peak_extra_bytes": extra,
            }
        )
        print(_line(rows[-1]), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['seq_len']:>8} K={row['kv_heads']:<2} R={row['R']:<3} {row['pass']:<17}"
        f" dense {row['dense_ms']:9.2f} ms ({row['dense_backend']})"
        f"  ours {row['ours_ms']:8.2f} = choose {row['select_ms']:.2f} + attend"
        f" {row['attend_ms']:.2f} + rest   {row['ratio']:6.2f} x"
        f"  attention alone {row['attend_ratio']:.2f} x, {row['roofline']:.0%} of the bound"
    )


def parse(argv: list[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="gsa_kernels.bench.attention", description=__doc__)
    cuda = torch.cuda.is_available()
    p.add_argument("--out", type=Path, help="JSON file to write")
    p.add_argument("--commit", help="to record, where the sources are no git checkout")
    p.add_argument("--device", default="cuda" if cuda else "cpu")
    p.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    p.add_argument("--lengths", type=int, nargs="+", default=[131072] if cuda else [8192])
    p.add_argument("--longest-backward", type=int, default=262144)
    p.add_argument("--heads", type=int, default=16 if cuda else 4)
    p.add_argument("--kv-heads", type=int, nargs="+", default=[4] if cuda else [2])
    p.add_argument("--head-dim", type=int, default=128 if cuda else 32)
    p.add_argument("--k", type=int, default=2048)
    p.add_argument("--mode", default="tile", choices=["tile", "block", "token"])
    p.add_argument(
        "--inputs",
        default="random",
        choices=["random", "smooth"],
        help="index queries: independent (the worst case), or slowly changing",
    )
    p.add_argument("--memory", type=int, default=256, help="positions a smooth query remembers")
    p.add_argument("--key-block", type=int, default=64)
    p.add_argument("--tiles", type=int, nargs="+", default=[64])
    p.add_argument("--impl", default="auto", choices=["auto", "triton", "eager"])
    p.add_argument("--dense", nargs="+", default=["cudnn", "flash"] if cuda else ["cpu"])
    p.add_argument("--peak-flops", type=float, default=750e12 if cuda else 2e11)
    p.add_argument("--peak-bytes-s", type=float, default=4.2e12 if cuda else 2e10)
    args = p.parse_args(argv)
    if args.mode != "tile":
        args.tiles = [1]
    if args.mode == "token":
        args.key_block = 1
    return args


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    report: dict[str, Any] = environment(torch.device(args.device))
    report["commit"] = args.commit or report["commit"]
    report["command"] = "python -m gsa_kernels.bench.attention " + shlex.join(argv)
    report["error_over_low_precision"], rows = {}, []
    for tile in args.tiles:
        for kv_heads in args.kv_heads:
            ratios = verify(args, tile, kv_heads)
            report["error_over_low_precision"][f"R={tile} K={kv_heads}"] = ratios
    for tokens in args.lengths:
        for kv_heads in args.kv_heads:
            for tile in args.tiles:
                rows += records(args, tokens, kv_heads, tile)
    report["records"] = rows
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
