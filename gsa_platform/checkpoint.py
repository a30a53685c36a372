"""The checkpoint that a run writes, and reading one that a user names."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from gsa_platform import registry
from gsa_platform.components import BEFORE, SLOTS
from gsa_platform.errors import UserError
from gsa_platform.model.transformer import Transformer
from gsa_platform.module import CONFIG_KEY
from gsa_platform.registry import Registry


class LastCheckpoint(ModelCheckpoint):
    """Writes last.ckpt every few steps, at the end, and when an exception or Ctrl-C ends the run.

    Keeps no state of its own in it: Lightning would warn whenever a resumed run has other
    settings, and take the file that was resumed from for one of its own, to be deleted.
    """

    def __init__(self, folder: Path, every: int) -> None:
        super().__init__(
            dirpath=folder,
            filename="last",
            every_n_train_steps=every,
            save_top_k=1,
            save_on_exception=True,
            enable_version_counter=False,
        )

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def read_checkpoint(path: Path, setting: str) -> dict[str, Any]:
    """The content of a checkpoint file, mapped and not copied; raises UserError, naming the
    `setting` that gave the path, if it is none."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        saved["state_dict"]
    except Exception as error:  # whatever the bytes of another file lead the reader to
        raise UserError(
            f"{setting}={path} is not a checkpoint. Type the path of a .ckpt file or of a run "
            "folder."
        ) from error
    assert isinstance(saved, dict)
    return saved


def saved_config(saved: dict[str, Any]) -> dict[str, Any]:
    """The configuration in a checkpoint, with settings that its components had not yet (`added`)
    as they behaved then."""
    cfg: dict[str, Any] = saved[CONFIG_KEY]["config"]
    plugins = registry.get(cfg.get("plugins_path"))
    return cfg | {slot: _before(plugins, slot, cfg[slot]["name"]) | cfg[slot] for slot in SLOTS}


def _before(plugins: Registry, slot: str, name: str) -> dict[str, Any]:
    settings = fields(plugins.component(slot, name).config)
    return {f.name: f.metadata[BEFORE] for f in settings if BEFORE in f.metadata}


def check_checkpoint(model: Transformer, cfg: Any) -> int | None:
    """The optimizer step at which train.resume was written, None if it does not say.

    Raises UserError if it holds the weights of another model.
    """
    path = Path(cfg.train.resume)
    if path.is_dir():
        return None  # sharded
    content = read_checkpoint(path, "train.resume")
    saved = content["state_dict"]
    own = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    for name in sorted(saved.keys() | own.keys()):
        old, new = (tuple(w[name].shape) if name in w else "absent" for w in (saved, own))
        if old != new:
            raise UserError(
                f"train.resume={path} holds another model: {name} is {old} there and {new} here. "
                "Type the model and component settings of its config.yaml, or leave out "
                "train.resume."
            )
    if CONFIG_KEY in content:
        _check_added(content[CONFIG_KEY]["config"], cfg)
    step = content.get("global_step")
    return None if step is None else int(step)


def _check_added(saved: dict[str, Any], cfg: Any) -> None:
    """Raise UserError where a setting that was `added` differs: shapes of weights do not tell."""
    plugins = registry.get(cfg.get("plugins_path"))
    for slot in (s for s in SLOTS if saved[s]["name"] == cfg[s].name):
        for name, before in _before(plugins, slot, cfg[slot].name).items():
            then = saved[slot].get(name, before)
            if then != cfg[slot][name]:
                raise UserError(
                    f"train.resume={cfg.train.resume} holds another model: it was trained with "
                    f"{slot}.{name}={str(then).lower()}. Type that, or leave out train.resume."
                )
