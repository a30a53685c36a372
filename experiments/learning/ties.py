"""Do index scores tell keys apart? Logits, ties and what they cost, of trained runs.

    python experiments/learning/ties.py runs/learning/kl_0/RUN runs/learning/no_norm_kl_0/RUN

Prints JSON, a run an entry: over layers and queries in the last half of validation sequences,
single keys outside window and sinks,
    std         standard deviation of the index logits over keys, of the widest head of any layer
    beyond_8    share of the logits outside -8 .. 8
    tied        share of queries whose least chosen score, to 12 bits, is that of keys left out
    ties        mean number of keys of that score
A layer's figures are under `layers`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from gsa_platform.eval.command import load

SEQUENCES, STRIDE, BITS = 2, 4, 12


@torch.no_grad()
def measure(folder: str) -> dict[str, Any]:
    run = load([f"checkpoint={folder}"])
    budget = run.cfg.sparsity
    batch = next(iter(run.data.val_dataloader()))
    tokens = batch["tokens_BT"][:SEQUENCES].to(run.device)
    seen: list[Any] = []
    for block in run.module.model.blocks:
        block.attention.indexer.register_forward_hook(lambda _m, _i, out: seen.append(out))
    run.module.model(tokens, None)
    layers = [layer(factors, budget) for factors in seen]
    names = ("beyond_8", "tied", "ties")
    means = {n: sum(row[n] for row in layers) / len(layers) for n in names}
    return {"std": max(row["std"] for row in layers), **means, "layers": layers}


def layer(factors: Any, budget: Any) -> dict[str, float]:
    total = factors.n_queries
    at = torch.arange(total // 2, total, STRIDE, device=factors.k_BSI.device)
    key = torch.arange(total, device=at.device)
    free = (key >= budget.sinks) & (key <= at[:, None] - budget.window)  # [T, S]
    rows = factors.rows(at)
    logits = torch.einsum("btji,bsi->btjs", rows.q_BTJI.float(), rows.keys_BSI.float())
    logits = logits * rows.scale
    if rows.bias_J is not None:
        logits = logits + rows.bias_J[:, None]
    inside = [x[..., keep] for x, keep in zip(logits.unbind(1), free)]  # [B, J, n] each
    scores = rows.tile(rows.keys_BSI)[:, 0].masked_fill(~free, -torch.inf)
    chosen = min(budget.k - budget.window - budget.sinks, int(free[0].sum()))
    short = (scores.float().view(torch.int32) + (1 << BITS - 1)) >> BITS
    least = short.masked_fill(~free, -(1 << 31)).topk(chosen).values[..., -1:]
    ties = ((short == least) & free).sum(-1)
    left = (short >= least).logical_and(free).sum(-1) > chosen
    return {
        "std": max(float(x.std(-1).mean(0).max()) for x in inside),
        "beyond_8": float(torch.cat([(x.abs() > 8).float().flatten() for x in inside]).mean()),
        "tied": float(left.float().mean()),
        "ties": float(ties.float().mean()),
    }


if __name__ == "__main__":
    found = [{"run": Path(folder).parent.name, **measure(folder)} for folder in sys.argv[1:]]
    print(json.dumps(found, indent=1))
