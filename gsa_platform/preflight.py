"""What only trying can tell: whether the data, the components and a checkpoint can be used.

    python -m gsa_platform.preflight < config.yaml

tries it in a process of its own. Exit codes: 0 ok, 2 refused, with the message on stdout.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from omegaconf import OmegaConf

from gsa_platform import registry
from gsa_platform.callbacks import build_callbacks
from gsa_platform.checkpoint import check_checkpoint
from gsa_platform.data.build import build_data
from gsa_platform.data.datamodule import TextDataModule
from gsa_platform.errors import UserError
from gsa_platform.model.transformer import Transformer
from gsa_platform.worker import EXIT_CODES


def preflight(cfg: Any) -> TextDataModule | None:
    """Prepare the data, and build the model without memory; raises UserError for what is refused.

    Returns the data for the training to go on with, or None if something failed that the user
    did not ask for: that is for the training to raise, in a run that keeps it.
    """
    try:
        data = build_data(cfg)
        data.prepare_data()
        with torch.device("meta"):
            model = Transformer(cfg, data.vocab_size, registry.get(cfg.get("plugins_path")))
        if cfg.train.resume is not None:
            check_checkpoint(model, cfg)
        build_callbacks(cfg)
        on_gpu = cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()
        model.describe("cuda" if on_gpu else "cpu")
    except UserError:
        raise
    except Exception:  # the training meets it again, where it is recorded; or only meta did
        return None
    return data


def main() -> int:
    """Try the configuration on stdin."""
    try:
        preflight(OmegaConf.create(sys.stdin.read()))
    except UserError as error:
        print(error)
        return EXIT_CODES["user"]
    return 0


if __name__ == "__main__":
    sys.exit(main())
