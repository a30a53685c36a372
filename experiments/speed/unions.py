"""How alike neighbouring queries choose: unions of single-key selections of a trained checkpoint.

    python experiments/speed/unions.py RUN_FOLDER [--rows 8]

For each layer, over the second half of the context: union of 16 neighbours' keys / a query's own
keys (what the forward and dq of `token` mode pay), the same where whole blocks of 16, 32 or 64
keys are fetched, and the chosen keys of a block that one query, or any of 16, touches. Beside it,
the same for keys chosen at random. Window and sinks are not counted. Writes unions.json.
"""

import argparse
import json
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from gsa_platform.checkpoint import read_checkpoint
from gsa_platform.eval.command import load

GROUP, BLOCKS = 16, (16, 32, 64)


def measures(chosen_TS: Tensor) -> dict[str, float]:
    """chosen_TS: bool, the keys that each of a multiple of 16 neighbouring queries chose."""
    mean = chosen_TS.sum(-1).float().mean()
    union = chosen_TS.unflatten(0, (-1, GROUP)).any(1)
    found = {"keys": mean, "union_of_keys": union.sum(-1).float().mean() / mean}
    for block in BLOCKS:
        pad = (0, -chosen_TS.shape[1] % block)
        own, shared = (
            torch.nn.functional.pad(x, pad).unflatten(-1, (-1, block)) for x in (chosen_TS, union)
        )
        touched, united = own.any(-1).sum(), shared.any(-1).sum()
        found[f"keys_of_{block}_own"] = own.sum() / touched
        found[f"keys_of_{block}_united"] = shared.sum() / united
        found[f"union_of_blocks_of_{block}"] = united * block / len(union) / mean
    return {name: round(float(value), 2) for name, value in found.items()}


def random_like(chosen_TS: Tensor, first: int) -> Tensor:
    """As many keys per query, uniform among those before it."""
    out = torch.zeros_like(chosen_TS)
    for row, count in enumerate(chosen_TS.sum(-1).tolist()):
        out[row, torch.randperm(first + row)[:count]] = True
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run folder or checkpoint of attention.mode=token")
    parser.add_argument("--rows", type=int, default=8, help="sequences of the validation split")
    args = parser.parse_args()
    run = load([f"checkpoint={args.run}"])
    selections: list[list[object]] = []
    attentions = [m for m in run.module.model.modules() if hasattr(m, "selection_spec")]
    for layer, attention in enumerate(attentions):
        selections.append([])
        attention.register_forward_pre_hook(
            lambda _, inputs, layer=layer: selections[layer].append(inputs[3])
        )
    rows = 0
    for batch in run.data.val_dataloader():
        with torch.no_grad():
            run.module.model(batch["tokens_BT"].to(run.device), None)
        rows += batch["tokens_BT"].shape[0]
        if rows >= args.rows:
            break
    torch.manual_seed(0)
    layers = []
    for layer, found in enumerate(selections):
        parts, baseline = [], []
        for selection in found:
            half = selection.n_queries // 2 // GROUP * GROUP
            for blocks in selection.blocks_BHQN.flatten(0, 1)[:, half:].cpu().long():
                keep = blocks[: len(blocks) // GROUP * GROUP]
                chosen = torch.zeros(len(keep), selection.n_keys + 1, dtype=torch.bool)
                chosen.scatter_(1, keep.where(keep >= 0, selection.n_keys), True)
                parts.append(measures(chosen[:, :-1]))
                baseline.append(measures(random_like(chosen[:, :-1], half)))
        layers.append({"layer": layer, "trained": average(parts), "random": average(baseline)})
        print(json.dumps(layers[-1]))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    record = {
        "context": int(run.cfg.context),
        "budget": int(run.cfg.sparsity.k),
        "model": run.cfg.model.name,
        "steps": read_checkpoint(Path(run.checkpoint), "checkpoint")["global_step"],
        "sequences": rows,
        "commit": commit.strip(),
        "layers": layers,
    }
    path = Path(__file__).with_name("unions.json")
    path.write_text(json.dumps(record, indent=1) + "\n")


def average(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(sum(p[name] for p in parts) / len(parts), 2) for name in parts[0]}


if __name__ == "__main__":
    main()
