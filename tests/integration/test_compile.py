"""train.compile: the same losses as without, few graphs, and checkpoints that fit both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from gsa_platform import compose, registry
from gsa_platform.diagnostics.device import check_compiler
from gsa_platform.errors import UserError
from gsa_platform.eval.command import evaluate
from gsa_platform.launch import launch
from gsa_platform.model.cross_entropy import chunked_cross_entropy
from gsa_platform.model.transformer import Transformer
from gsa_platform.validate import validate

CONTEXT, VOCABULARY, STEPS = 256, 97, 6
SMALL = ["experiment=smoke", f"context={CONTEXT}", "tracking=none"]
BUDGET = ["sparsity.k=128"]
WARM_UP_ENDS = 2

CASES = [
    ["attention=dense"],
    ["attention=dense", "data.cross_document=false"],
    [*BUDGET, "objective=none"],
    [*BUDGET, "objective=bias"],
    [*BUDGET, "objective=kl", f"objective.warmup_steps={WARM_UP_ENDS}"],
    [*BUDGET, "objective=kl", "data.cross_document=false"],
    [*BUDGET, "objective=kl", "train.activation_checkpointing=true", "indexer.key_dtype=fp8"],
    [*BUDGET, "sparsity=adaptive_variance", "sparsity.k_min=64", "sparsity.window=32",
     "sparsity.sinks=16"],
    ["attention=sliding_window", "attention.window=64"],
    [*BUDGET, "indexer=random", "objective=none", "model.n_layers=10"],
    [*BUDGET, "indexer=hierarchical", "sparsity=scheduled", "sparsity.k_start=192",
     "sparsity.steps=5", "sparsity.window=32", "sparsity.sinks=16"],
    [*BUDGET, "objective=kl_bias", "sparsity=learned", "sparsity.k_min=64", "sparsity.window=32",
     "sparsity.sinks=16"],
    [*BUDGET, "model.n_layers=10", "model.layer_pattern=[dense:1,'*']",
     "train.activation_checkpointing=true"],
]  # fmt: skip


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def learn(overrides: list[str], compiled: bool) -> tuple[list[float], list[int]]:
    """(loss, graphs compiled so far) of each of a few steps of plain gradient descent."""
    cfg = compose.load([*SMALL, *overrides])
    torch.manual_seed(0)
    model = Transformer(cfg, VOCABULARY, registry.get())
    torch._dynamo.reset()
    counters.clear()
    if compiled:
        # Without code generation, which would cost minutes; what is traced is the same.
        model.compile_blocks(backend="aot_eager")
    generator = torch.Generator().manual_seed(1)
    losses, compiled_graphs = [], []
    for step in range(STEPS):
        text = torch.randint(0, VOCABULARY, (2, CONTEXT + 1), generator=generator)
        docs = None
        if not cfg.data.cross_document:  # documents of other lengths at every step
            docs = (torch.arange(CONTEXT) // (50 + 7 * step) * (50 + 7 * step)).expand(2, -1)
        out = model(text[:, :-1], docs, step)
        nll, n = chunked_cross_entropy(
            out.hidden_BTD.flatten(0, 1), model.head_weight_VD, text[:, 1:].flatten(), 4096
        )
        loss = nll / n + sum(r.index_loss for r in out.reports if r.index_loss is not None)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
        if all(report.statistics for report in out.reports):
            model.observe([report.statistics for report in out.reports])
        losses.append(float(loss.detach()))
        compiled_graphs.append(graphs())
    return losses, compiled_graphs


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_compiled_steps_learn_the_same_and_compile_once(overrides: list[str]) -> None:
    expected, none = learn(overrides, compiled=False)
    assert none == [0] * STEPS
    losses, compiled_graphs = learn(overrides, compiled=True)
    assert losses == pytest.approx(expected, rel=1e-5)
    # The number of the step, the layer and the documents make no graph of their own.
    last = WARM_UP_ENDS if "warmup" in overrides[-1] else 0
    assert 1 <= compiled_graphs[-1] <= 8
    assert compiled_graphs[last:] == [compiled_graphs[-1]] * (STEPS - last)


def test_a_machine_that_cannot_compile_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(function):
        raise RuntimeError("No working C++ compiler found\nmore")

    monkeypatch.setattr(torch, "compile", missing)
    with pytest.raises(UserError, match=r"No working C\+\+ compiler found\. .*leave out"):
        check_compiler(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="generated code needs a C++ compiler")
def test_compiled_training_and_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two compiled ranks follow one plain rank, then each goes on from the other's checkpoint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GSA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def train(name: str, *overrides: str) -> tuple[Path, list[float]]:
        """Checkpoint and losses of a run."""
        cfg = compose.load(
            [
                *SMALL,
                *BUDGET,
                f"name={name}",
                "optim.schedule=constant",
                "model.layer_pattern=[dense:1,'*']",
                "train.activation_checkpointing=true",
                "train.accumulate=2",
                "train.val_every=1",
                *overrides,
            ]
        )
        validate(cfg)
        folder = Path(launch(cfg)["run_dir"])
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses = [line["train/loss"] for line in lines if "train/loss" in line]
        return folder / "checkpoints" / "last.ckpt", losses

    alone, together = "train.batch_size=2", "trainer.devices=2"
    plain, expected = train("plain", "train.steps=2", alone)
    fast, losses = train("fast", "train.steps=2", together, "train.compile=true")
    assert losses == pytest.approx(expected, rel=1e-4)
    weights = [torch.load(p, weights_only=True)["state_dict"] for p in (plain, fast)]
    assert weights[0].keys() == weights[1].keys()
    judged = [evaluate([f"checkpoint={p}", alone])["loss"] for p in (plain, fast)]
    assert judged[1] == pytest.approx(judged[0], rel=1e-4)
    after = []
    for saved, settings in ((fast, ()), (plain, ("train.compile=true",))):
        copy = shutil.copy(saved, tmp_path / f"{saved.parents[2].name}.ckpt")  # no run folder
        on = train(f"{copy.stem}_on", "train.steps=3", f"train.resume={copy}", alone, *settings)
        after.append(on[1])
    assert len(after[0]) == 1 and after[1] == pytest.approx(after[0], rel=1e-4)
