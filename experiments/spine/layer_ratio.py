"""One attention layer, forward + backward, eager GSA in tile mode against dense SDPA, in one run.

    python experiments/spine/layer_ratio.py [tokens ...]

The whole path is timed: scoring, selection, attention and both gates (index projection excluded);
4 query heads, 2 key-value heads of 32 channels, 4 x 32 indexer, k = 2048, C = R = 64. Dense SDPA
gets keys and values already repeated to its heads. Writes layer_ratio.json beside this file.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from gsa_kernels import SelectionSpec
from gsa_kernels.index_score import IndexFactors
from gsa_kernels.select import select
from gsa_kernels.sparse_attention import sparse_attention

HEADS, KV_HEADS, WIDTH, INDEX_HEADS, INDEX_WIDTH, BUDGET = 4, 2, 32, 4, 32, 2048
HERE = Path(__file__).parent


def seconds(run: Callable[[], None], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compare(tokens: int) -> dict[str, float]:
    """Seconds and their ratio at one context length."""
    q = torch.randn(1, tokens, HEADS, WIDTH, requires_grad=True)
    k, v = (torch.randn(1, tokens, KV_HEADS, WIDTH, requires_grad=True) for _ in range(2))
    gates = [torch.rand(1, tokens, n, WIDTH, requires_grad=True) for n in (KV_HEADS, HEADS)]
    factors = IndexFactors(
        torch.randn(1, tokens, INDEX_HEADS, INDEX_WIDTH),
        torch.randn(1, tokens, INDEX_WIDTH),
        torch.rand(1, tokens, INDEX_HEADS),
        torch.zeros(INDEX_HEADS),
        INDEX_WIDTH**-0.5,
    )
    spec = SelectionSpec(64, 64, window=128, sinks=64)

    def sparse() -> None:
        chosen = select(factors, spec, BUDGET, BUDGET, tokens).selection
        out = sparse_attention(q, k, v * gates[0], chosen).out_BTHE * gates[1]
        out.sum().backward()

    group = HEADS // KV_HEADS
    dense_q = q.detach().transpose(1, 2).contiguous().requires_grad_()
    dense_k, dense_v = (
        x.detach().repeat_interleave(group, 2).transpose(1, 2).contiguous().requires_grad_()
        for x in (k, v)
    )

    def dense() -> None:
        F.scaled_dot_product_attention(dense_q, dense_k, dense_v, is_causal=True).sum().backward()

    sparse()
    sparse_s = seconds(sparse, 3)
    dense_s = seconds(dense, 2 if tokens <= 32768 else 1)
    return {
        "tokens": tokens,
        "sparse_s": sparse_s,
        "dense_s": dense_s,
        "ratio": dense_s / sparse_s,
    }


def main() -> None:
    lengths = [int(x) for x in sys.argv[1:]] or [32768, 131072]
    torch.manual_seed(0)
    rows = [compare(tokens) for tokens in lengths]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE)
    report = {
        "command": "python experiments/spine/layer_ratio.py " + " ".join(map(str, lengths)),
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "device": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "shape": f"H={HEADS} K={KV_HEADS} E={WIDTH} k={BUDGET} C=64 R=64, float32",
        "rows": rows,
    }
    (HERE / "layer_ratio.json").write_text(json.dumps(report, indent=1) + "\n")
    for row in rows:
        print(
            "{tokens:>7} tokens  {sparse_s:8.2f} s  dense {dense_s:8.2f} s  {ratio:6.2f} x".format(
                **row
            )
        )


if __name__ == "__main__":
    main()
