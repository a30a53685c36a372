"""`eval`: load a checkpoint, run the tasks that were asked for, print and save what they say.

`gsa-platform eval checkpoint=runs/.../last.ckpt [task=NAME,NAME] [context=N] [data...=...]`
The model is rebuilt from the configuration inside the checkpoint; overrides change the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gsa_platform import registry
from gsa_platform.atomic import write_json
from gsa_platform.components import SLOTS
from gsa_platform.config import DataConfig, root
from gsa_platform.errors import UserError
from gsa_platform.eval.task import EvalRun
from gsa_platform.explain import parse, refusal
from gsa_platform.validate import validate

FIXED = ("model", "attention", "indexer", "gate", "objective", "trainer", "optim")
OWN = ("checkpoint", "task")
DEFAULT_TASK = "perplexity"


def main(overrides: list[str]) -> int:
    """Evaluate, print and write eval.json beside the checkpoint; returns 0.

    Raises UserError for a missing or foreign checkpoint, an unknown task and for overrides it
    cannot take.
    """
    result = evaluate(overrides, print)
    path = Path(result["checkpoint"]).parent / "eval.json"
    write_json(path, result)
    print(f"written {path}")
    return 0


def evaluate(
    overrides: list[str], show: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """What the tasks say: {checkpoint, context, ...}; each task's text goes to `show`."""
    names = [n for o in overrides if o.startswith("task=") for n in o.partition("=")[2].split(",")]
    found = registry.get()
    tasks = {name: found.target("eval_task", name)() for name in names or [DEFAULT_TASK]}
    run = load(overrides)
    show(f"checkpoint   {run.checkpoint}\ncontext      {int(run.cfg.context):,} tokens")
    result: dict[str, Any] = {"checkpoint": run.checkpoint, "context": int(run.cfg.context)}
    for name, task in tasks.items():
        values = task.evaluate(run)
        show(task.render(values))
        # The default task's numbers stand at the top, where scripts look for them.
        result |= values if name == DEFAULT_TASK else {name: values}
    return result


def load(overrides: list[str]) -> EvalRun:
    """The checkpoint that ``checkpoint=PATH`` names, with the other overrides applied."""
    import torch

    from gsa_platform.checkpoint import read_checkpoint, saved_config
    from gsa_platform.data.build import build_data
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
    typed = [o for o in overrides if o.partition("=")[0] not in OWN]
    cfg = changed(saved_config(saved), typed)
    validate(cfg)
    data = build_data(cfg)
    if data.vocab_size != saved[CONFIG_KEY]["vocab_size"]:
        raise UserError(
            f"data.tokenizer={cfg.data.tokenizer} has {data.vocab_size} tokens, the checkpoint "
            f"{saved[CONFIG_KEY]['vocab_size']}"
        )
    data.prepare_data()
    module = LanguageModel(cfg, data.vocab_size, registry.get(cfg.get("plugins_path")))
    module.load_state_dict(saved["state_dict"], strict=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return EvalRun(str(path), cfg, module.to(device).eval(), data, device)


def changed(saved: dict[str, Any], overrides: list[str]) -> Any:
    """The configuration of a checkpoint with the settings typed; raises UserError for those it
    cannot take."""
    cfg: Any = typed_config(saved)
    for text in overrides:
        if text.startswith("data="):
            cfg.data = other_data(cfg, text.partition("=")[2])
            continue
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


def other_data(cfg: Any, name: str) -> DictConfig:
    """The settings of another data module, with what every module has taken over."""
    node = OmegaConf.structured(registry.get().component("data", name).config)
    for key in {f.name for f in fields(DataConfig)} - {"name"}:
        node[key] = cfg.data[key]
    assert isinstance(node, DictConfig)
    return node


def typed_config(saved: dict[str, Any]) -> DictConfig:
    """A saved configuration with the types of its settings, as composing gives it."""
    found = registry.get(saved.get("plugins_path"))
    schema = OmegaConf.structured(root(found))
    for slot in (*SLOTS, "data"):
        schema[slot] = OmegaConf.structured(found.component(slot, saved[slot]["name"]).config)
    try:
        cfg = OmegaConf.merge(schema, saved)
    except OmegaConfBaseException:  # of another version, with settings that are no more
        cfg = OmegaConf.create(saved)
    assert isinstance(cfg, DictConfig)
    OmegaConf.set_struct(cfg, True)
    return cfg
