"""Perplexity of a checkpoint on the validation documents, overall and by position in the context.

`gsa-platform eval checkpoint=runs/.../last.ckpt [context=N] [train.val_batches=N] [data...=...]`
The model is rebuilt from the configuration inside the checkpoint; overrides change the rest.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gsa_platform import registry
from gsa_platform.atomic import write_json
from gsa_platform.components import SLOTS
from gsa_platform.config import RootConfig
from gsa_platform.errors import UserError
from gsa_platform.explain import parse, refusal
from gsa_platform.validate import validate

FIXED = ("model", "attention", "indexer", "gate", "objective", "trainer", "optim")


def main(overrides: list[str]) -> int:
    """Evaluate, print a table and write eval.json beside the checkpoint; returns 0.

    Raises UserError for a missing or foreign checkpoint and for overrides it cannot take.
    """
    result = evaluate(overrides)
    print(render(result))
    path = Path(result["checkpoint"]).parent / "eval.json"
    write_json(path, result)
    print(f"written {path}")
    return 0


def evaluate(overrides: list[str]) -> dict[str, Any]:
    """{checkpoint, context, tokens, loss, perplexity, bits_per_byte, by_position}."""
    import torch

    from gsa_platform.checkpoint import read_checkpoint
    from gsa_platform.data.datamodule import TextDataModule
    from gsa_platform.metrics.nll import PositionNLL, TokenNLL
    from gsa_platform.model.cross_entropy import chunked_nll
    from gsa_platform.module import CONFIG_KEY, LanguageModel

    paths = [o.partition("=")[2] for o in overrides if o.startswith("checkpoint=")]
    if len(paths) != 1:
        raise UserError(
            "eval needs checkpoint=PATH, for example\n"
            "  gsa-platform eval checkpoint=runs/gsa_128k/<run>/checkpoints/last.ckpt"
        )
    path = Path(paths[0]).expanduser().absolute()
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise UserError(f"checkpoint={path}: no such file; give a .ckpt file or a run folder")
    saved = read_checkpoint(path, "checkpoint")
    if CONFIG_KEY not in saved:
        raise UserError(f"checkpoint={path} was not written by gsa_platform")
    cfg = changed(
        saved[CONFIG_KEY]["config"], [o for o in overrides if not o.startswith("checkpoint=")]
    )
    validate(cfg)
    data = TextDataModule(cfg)
    if data.vocab_size != saved[CONFIG_KEY]["vocab_size"]:
        raise UserError(
            f"data.tokenizer={cfg.data.tokenizer} has {data.vocab_size} tokens, the checkpoint "
            f"{saved[CONFIG_KEY]['vocab_size']}"
        )
    data.prepare_data()
    module = LanguageModel(cfg, data.vocab_size, registry.get(cfg.get("plugins_path")))
    module.load_state_dict(saved["state_dict"], strict=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = module.model.to(device).eval()
    total, positions = TokenNLL(), PositionNLL(cfg.context)
    half = device.type == "cuda" and "bf16" in str(cfg.trainer.precision)
    for batch in data.val_dataloader():
        tokens, targets = batch["tokens_BT"].to(device), batch["targets_BT"].to(device)
        docs = None if cfg.data.cross_document else batch["doc_start_BT"].to(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            hidden = model(tokens, docs).hidden_BTD.flatten(0, 1)
            nll = chunked_nll(hidden, model.head_weight_VD, targets.flatten(), cfg.train.ce_chunk)
        nll, scored = nll.view_as(targets).cpu(), (targets != -100).cpu()
        total.update(nll[scored].double().sum(), scored.sum())
        where = torch.arange(tokens.shape[1]).expand_as(nll)
        positions.update(nll, where, scored)
    if not int(total.n_tokens):
        raise UserError("there is no validation text: set data.val_fraction above 0")
    loss = float(total.compute())
    by_position = [
        {"from": int(low), "to": int(high), "loss": float(value)}
        for (low, high), value in zip(positions.buckets, positions.compute().tolist(), strict=True)
        if math.isfinite(value)
    ]
    return {
        "checkpoint": str(path),
        "context": int(cfg.context),
        "tokens": int(total.n_tokens),
        "loss": loss,
        "perplexity": float(total.perplexity()),
        "bits_per_byte": float(total.bits_per_byte(data.bytes_per_token)),
        "by_position": by_position,
    }


def changed(saved: dict[str, Any], overrides: list[str]) -> Any:
    """The configuration of a checkpoint with the settings typed; raises UserError for those it
    cannot take."""
    cfg: Any = typed_config(saved)
    for text in overrides:
        override = parse(text)
        key = str(override.key_or_group)
        if key.partition(".")[0] in FIXED:
            raise UserError(
                f"eval cannot change {key}: it is fixed by the checkpoint. "
                "Change context, data, sparsity or train.val_batches instead."
            )
        if message := refusal(override, cfg):
            raise UserError(message)
        OmegaConf.update(cfg, key, override.value(), merge=True)
    cfg.train.compile, cfg.train.resume = False, None
    return cfg


def typed_config(saved: dict[str, Any]) -> DictConfig:
    """A saved configuration with the types of its settings, as composing gives it."""
    found = registry.get(saved.get("plugins_path"))
    schema = OmegaConf.structured(RootConfig)
    for slot in SLOTS:
        schema[slot] = OmegaConf.structured(found.component(slot, saved[slot]["name"]).config)
    try:
        cfg = OmegaConf.merge(schema, saved)
    except OmegaConfBaseException:  # of another version, with settings that are no more
        cfg = OmegaConf.create(saved)
    assert isinstance(cfg, DictConfig)
    OmegaConf.set_struct(cfg, True)
    return cfg


def render(result: dict[str, Any]) -> str:
    """The result as a short table."""
    lines = [
        f"checkpoint   {result['checkpoint']}",
        f"validation   {result['tokens']:,} tokens, context {result['context']:,}",
        f"loss         {result['loss']:.4f} nats/token, perplexity {result['perplexity']:,.3f}, "
        f"{result['bits_per_byte']:.4f} bits/byte",
        "",
        "positions in the context        loss   perplexity",
    ]
    for row in result["by_position"]:
        span = f"{row['from']:,} to {row['to'] - 1:,}"
        lines.append(f"{span:<26}{row['loss']:>10.4f}{math.exp(row['loss']):>13,.2f}")
    return "\n".join(lines)
