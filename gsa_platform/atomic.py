"""Atomic file writes: a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Replace the file `path` by `text` (UTF-8); parent folders are created.

    Raises OSError if the folder cannot be written; the old file is then untouched.
    """
    target = Path(path)
    temporary = _write_beside(target, text)
    try:
        os.replace(temporary, target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return target


def write_text_once(path: str | os.PathLike[str], text: str) -> bool:
    """Create the file `path` with `text`; False, and nothing written, if it exists already.

    Of several processes that try at once exactly one gets True.
    """
    target = Path(path)
    temporary = _write_beside(target, text)
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write `value` as indented JSON; values JSON does not know are written as their str()."""
    return write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def write_yaml(path: str | os.PathLike[str], value: Any) -> Path:
    """Write an OmegaConf config (interpolations resolved) or a plain value as YAML."""
    from omegaconf import OmegaConf

    config = value if OmegaConf.is_config(value) else OmegaConf.create(value)
    return write_text(path, OmegaConf.to_yaml(config, resolve=True))


def _write_beside(target: Path, text: str) -> Path:
    # Same folder, so that the rename stays on one file system; open() keeps the umask, which
    # tempfile would not.
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary
