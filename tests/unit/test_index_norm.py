"""Index logits that a sigmoid can tell apart: the norm that bounds them, the share beyond 8, and
checkpoints from before there was one."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_cases import make_factors

from gsa_kernels.selection import SelectionSpec
from gsa_platform import compose, registry
from gsa_platform.checkpoint import check_checkpoint, saved_config
from gsa_platform.contracts import LayerDims, Sequence
from gsa_platform.errors import UserError
from gsa_platform.metrics.observer import AttentionObserver
from gsa_platform.model.attention_layer import LayerReport
from gsa_platform.model.transformer import Transformer
from gsa_platform.module import CONFIG_KEY
from gsa_plugins.configs import GatedLightningConfig
from gsa_plugins.indexer import GatedLightningIndexer

DIMS = LayerDims(32, 4, 2, 8, 64)
SPEC = SelectionSpec(1, 1, 4, 0)
SMALL = ["experiment=smoke", "model.n_layers=1", "context=256", "tracking=none"]


def logits(dtype: torch.dtype = torch.float32, **settings) -> torch.Tensor:
    """Of an indexer whose weights training has made large, [B, T, J, S]."""
    torch.manual_seed(0)
    indexer = GatedLightningIndexer(GatedLightningConfig(dim=16, **settings), DIMS)
    with torch.no_grad():
        for proj in (indexer.q_proj, indexer.k_proj):
            proj.weight.mul_(30)
    x = torch.randn(2, 64, 32)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        factors = indexer(x, Sequence(), SPEC)
    assert factors.q_BTJI.dtype == factors.k_BSI.dtype == dtype
    q, k = factors.q_BTJI.float(), factors.k_BSI.float()
    return torch.einsum("btji,bsi->btjs", q, k) * factors.scale


@pytest.mark.parametrize("key_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_bounds_the_logits(dtype, key_dtype):
    found = logits(dtype, key_dtype=key_dtype)
    assert 3 < found.abs().max() < 16**0.5 * 1.05  # two roundings
    assert found.std() < 1.5
    assert logits(dtype, key_dtype="auto", qk_norm=False).abs().max() > 500


def test_the_size_of_the_weights_does_not_matter():
    torch.manual_seed(0)
    indexer = GatedLightningIndexer(GatedLightningConfig(dim=16), DIMS)
    x = torch.randn(2, 64, 32)
    small = indexer(x, Sequence(), SPEC)
    with torch.no_grad():
        indexer.q_proj.weight.mul_(7)
    torch.testing.assert_close(indexer(x, Sequence(), SPEC).q_BTJI, small.q_BTJI)


@pytest.mark.parametrize("q_start", [0, 40])
def test_saturated_counts_causal_logits(q_start):
    factors = make_factors(100)
    factors = replace(factors, q_BTJI=factors.q_BTJI[:, q_start:] * 6, q_start=q_start)
    logits = torch.einsum("btji,bsi->btjs", factors.q_BTJI, factors.k_BSI) * factors.scale
    logits += factors.bias_J[:, None]
    seen = torch.arange(100) <= torch.arange(q_start, 100)[:, None]
    every = logits.transpose(1, 2)[seen.expand(2, 4, -1, -1)]
    expected = (every.abs() > 8).float().mean()
    assert 0.1 < expected < 0.5
    torch.testing.assert_close(factors.saturated(), expected)
    torch.testing.assert_close(factors.saturated(30), expected, rtol=0.15, atol=0)


def test_relu_scores_do_not_saturate():
    assert make_factors(20, activation="relu").saturated() is None


def test_the_observer_gives_the_mean_and_the_worst_layer():
    observer = AttentionObserver(3, 10)
    reports = [LayerReport(saturated=torch.tensor(x)) for x in (0.2, 0.6)] + [LayerReport()]
    for _ in range(2):
        observer.update(reports, torch.arange(10)[None])
    found = observer.compute()
    assert found["index_saturated"] == pytest.approx(0.4)
    assert found["index_saturated_max"] == pytest.approx(0.6)
    observer.reset()
    assert not observer.saturated.count.any()


def test_only_probed_passes_look():
    cfg = compose.load(SMALL)
    model = Transformer(cfg, 97, registry.get())
    text = torch.randint(97, (1, 256))
    assert model(text).reports[0].saturated is None
    assert float(model(text, probe=True).reports[0].saturated) == 0


def older(tmp_path: Path, *overrides: str) -> tuple[dict, Transformer, Path]:
    """A checkpoint whose configuration has no qk_norm, as of before it existed."""
    from omegaconf import OmegaConf

    cfg = compose.load([*SMALL, *overrides])
    model = Transformer(cfg, 97, registry.get())
    config = OmegaConf.to_container(cfg, resolve=True)
    del config["indexer"]["qk_norm"]
    weights = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    saved = {"state_dict": weights, "global_step": 3, CONFIG_KEY: {"config": config}}
    torch.save(saved, tmp_path / "older.ckpt")
    return saved, model, tmp_path / "older.ckpt"


@pytest.mark.parametrize("name", ["gated_lightning", "relu_lightning", "pooled", "hierarchical"])
def test_an_older_checkpoint_is_read_as_it_was(tmp_path, name):
    saved, _, _ = older(tmp_path, f"indexer={name}")
    before = copy.deepcopy(saved[CONFIG_KEY])
    assert saved_config(saved)["indexer"]["qk_norm"] is False
    assert saved[CONFIG_KEY] == before
    saved[CONFIG_KEY]["config"]["indexer"]["qk_norm"] = True
    assert saved_config(saved)["indexer"]["qk_norm"] is True


def test_an_older_checkpoint_is_resumed_as_it_was(tmp_path):
    _, model, path = older(tmp_path)
    resume = f"train.resume={path}"
    with pytest.raises(UserError, match=r"was trained with indexer.qk_norm=false. Type that"):
        check_checkpoint(model, compose.load([*SMALL, resume]))
    cfg = compose.load([*SMALL, resume, "indexer.qk_norm=false"])
    assert check_checkpoint(model, cfg) == 3
