"""Eager sparse attention on a GPU against the float64 oracle: forward, gradients, three dtypes."""

import itertools
import json

import torch

from gsa_kernels import SelectionSpec
from gsa_kernels.index_score import IndexFactors
from gsa_kernels.select import select
from gsa_kernels.sparse_attention import sparse_attention


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def main() -> None:
    rows = []
    torch.manual_seed(0)
    cases = itertools.product(((1, 1), (64, 1), (64, 64)), (63, 100, 1000))
    for (c, r), t in cases:
        factors = IndexFactors(
            *(torch.randn(s, device="cuda") for s in ((2, t, 4, 32), (2, t, 32))),
            torch.rand(2, t, 4, device="cuda"),
        )
        spec = SelectionSpec(c, r, window=64, sinks=4)
        selection = select(factors, spec, 300, 300, t).selection
        oracle = select(factors, spec, 300, 300, t, impl="reference").selection
        same = bool((selection.blocks_BHQN == oracle.blocks_BHQN).all())
        shapes = ((2, t, 8, 64), (2, t, 2, 64), (2, t, 2, 64))
        base = [torch.randn(s, device="cuda", dtype=torch.float64) for s in shapes]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            # The oracle sees the inputs as rounded, so only the arithmetic is compared.
            low = [x.to(dtype) for x in base]
            result = {}
            for name, impl, inputs in (
                ("want", "reference", [x.double() for x in low]),
                ("low", "reference", low),
                ("got", "eager", low),
            ):
                leaves = [x.clone().requires_grad_() for x in inputs]
                out = sparse_attention(*leaves, selection, impl=impl).out_BTHE
                grads = torch.autograd.grad(out.double().sin().sum(), leaves)
                result[name] = [out, *grads]
            for name, got, low_ref, want in zip(
                ("out", "dq", "dk", "dv"),
                result["got"],
                result["low"],
                result["want"],
                strict=True,
            ):
                rows.append(
                    {
                        "C": c,
                        "R": r,
                        "T": t,
                        "dtype": str(dtype),
                        "tensor": name,
                        "error": error(got, want),
                        "low_precision_error": error(low_ref, want),
                        "selection_equal": same,
                    }
                )
    bad = [x for x in rows if not x["error"] <= 2 * x["low_precision_error"] + 1e-6]
    unequal = [x for x in rows if not x["selection_equal"]]
    print(
        f"{len(rows)} comparisons, {len(bad)} over twice the low-precision error, "
        f"{len(unequal)} with another selection"
    )
    print(json.dumps(bad[:6] + unequal[:3], indent=1))


if __name__ == "__main__":
    main()
