"""The checkpoint that a run writes, and the look at the one that it goes on from."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from gsa_platform.errors import UserError
from gsa_platform.module import LanguageModel

# What torch.load raises for files that are no checkpoint, and a look-up in one of something else.
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, KeyError)


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


def check_checkpoint(module: LanguageModel, path: Path) -> int | None:
    """The optimizer step at which a checkpoint was written, None if it is a sharded one.

    Raises UserError if it cannot be read, or its weights do not fit the configured model.
    """
    if path.is_dir():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        weights, step = saved["state_dict"], int(saved["global_step"])
    except (*UNREADABLE, TypeError) as error:
        raise UserError(
            f"train.resume={path} is not a checkpoint. Give a last.ckpt that a run wrote, its run "
            "folder, or auto."
        ) from error
    own = module.state_dict()
    for name in sorted(weights.keys() | own.keys()):
        old, new = (tuple(w[name].shape) if name in w else "absent" for w in (weights, own))
        if old != new:
            raise UserError(
                f"train.resume={path} holds another model: {name} is {old} there and {new} here. "
                "Type the model and component settings of its config.yaml, or leave out "
                "train.resume."
            )
    return step
