"""Reading a checkpoint file that a user names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gsa_platform.errors import UserError
from gsa_platform.model.transformer import Transformer


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


def check_checkpoint(model: Transformer, path: Path) -> None:
    """Raise UserError if a checkpoint file holds the weights of another model."""
    if path.is_dir():
        return  # sharded
    saved = read_checkpoint(path, "train.resume")["state_dict"]
    own = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    for name in sorted(saved.keys() | own.keys()):
        old, new = (tuple(w[name].shape) if name in w else "absent" for w in (saved, own))
        if old != new:
            raise UserError(
                f"train.resume={path} holds another model: {name} is {old} there and {new} here. "
                "Type the model and component settings of its config.yaml, or leave out "
                "train.resume."
            )
