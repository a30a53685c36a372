"""The checkpoint that a run writes, and reading one that a user names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from gsa_platform.errors import UserError
from gsa_platform.model.transformer import Transformer


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


def check_checkpoint(model: Transformer, path: Path) -> int | None:
    """The optimizer step at which a checkpoint was written, None if it does not say.

    Raises UserError if it holds the weights of another model.
    """
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
    step = content.get("global_step")
    return None if step is None else int(step)
