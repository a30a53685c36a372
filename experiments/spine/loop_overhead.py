"""What the platform's loop costs over a bare PyTorch loop of the same model and batches.

    python experiments/spine/loop_overhead.py [overrides ...]

Both train the same configuration from the same seed and must reach the same losses; rounds of the
two alternate in one process, and the medians of all their steps are compared. The platform's side
has its loggers (MLflow and the JSON lines), progress lines and figures on. Writes
loop_overhead.json beside this file.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning as L
import torch

from gsa_platform import registry
from gsa_platform.compose import load
from gsa_platform.data.datamodule import TextDataModule
from gsa_platform.launch import launch
from gsa_platform.model.cross_entropy import chunked_cross_entropy
from gsa_platform.module import LanguageModel
from gsa_platform.optim import build_optimizer, build_schedule

HERE = Path(__file__).parent
ROUNDS, SKIPPED = 3, 5  # the first steps of a round warm up
SETTINGS = [
    "experiment=gsa_128k",
    "name=loop_overhead",
    "picked.hardware=none",
    "context=2048",
    "sparsity.k=256",
    "train.batch_size=4",
    "train.steps=40",
    "train.dense_cost=false",
    "tracking.system_metrics=false",
]


def bare(cfg) -> tuple[list[float], list[float]]:  # type: ignore[no-untyped-def]
    """(seconds of each step, losses) of the plainest loop that trains the same thing."""
    L.seed_everything(cfg.seed, verbose=False)
    data = TextDataModule(cfg)
    data.prepare_data()
    module = LanguageModel(cfg, data.vocab_size, registry.get())
    optimizer = build_optimizer(module, cfg)
    schedule = build_schedule(optimizer, cfg)
    batches = iter(data.train_dataloader())
    model = module.model.train()
    times, losses = [], []
    for step in range(cfg.train.steps):
        start = time.perf_counter()
        batch = next(batches)
        out = model(batch["tokens_BT"], None, step)
        nll, n = chunked_cross_entropy(
            out.hidden_BTD.flatten(0, 1),
            model.head_weight_VD,
            batch["targets_BT"].flatten(),
            cfg.train.ce_chunk,
        )
        loss = nll / n
        index = torch.stack([r.index_loss for r in out.reports if r.index_loss is not None]).mean()
        optimizer.zero_grad(set_to_none=True)
        (loss + index).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        times.append(time.perf_counter() - start)
    return times, losses


def platform(cfg) -> tuple[list[float], list[float]]:  # type: ignore[no-untyped-def]
    """(seconds of each step, losses) of the platform's own training."""
    result = launch(cfg)
    lines = (Path(result["run_dir"]) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    tokens = cfg.context * cfg.train.batch_size
    times = [tokens / r["perf/tokens_per_s"] for r in rows if "perf/tokens_per_s" in r]
    return times, [r["train/loss"] for r in rows if "train/loss" in r]


def main() -> None:
    overrides = [*SETTINGS, *sys.argv[1:]]
    own: list[float] = []
    plain: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            cfg = load([*overrides, f"output_root={folder}"])
            times, reference = bare(cfg)
            plain += times[SKIPPED:]
            times, losses = platform(cfg)
            own += times[SKIPPED:]
            torch.testing.assert_close(losses, reference, rtol=1e-4, atol=0.0)
    ratio = statistics.median(own) / statistics.median(plain)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE)
    report = {
        "command": "python experiments/spine/loop_overhead.py " + " ".join(sys.argv[1:]),
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "settings": overrides,
        "steps_each": len(plain),
        "bare_step_s": statistics.median(plain),
        "platform_step_s": statistics.median(own),
        "ratio": ratio,
    }
    (HERE / "loop_overhead.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"bare {report['bare_step_s']:.4f} s, platform {report['platform_step_s']:.4f} s a step")
    print(f"overhead {100 * (ratio - 1):.1f} %")


if __name__ == "__main__":
    main()
