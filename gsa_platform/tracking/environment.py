"""What a run was made with: git state, package and plugin versions. Imports none of them."""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import gsa_platform

PACKAGES = (
    "torch",
    "lightning",
    "triton",
    "xformers",
    "hydra-core",
    "omegaconf",
    "mlflow",
    "torchmetrics",
    "tokenizers",
    "datasets",
    "numpy",
)
MAX_DIFF_CHARS = 1_000_000


@dataclass(frozen=True)
class GitState:
    """Commit ("" before the first commit), branch, and the uncommitted changes."""

    commit: str
    branch: str
    dirty: bool
    diff: str


def git_state() -> GitState | None:
    """State of the checkout the package runs from, else of the current folder, else None."""
    source = Path(gsa_platform.__file__ or __file__).parent
    # A package installed into a folder of someone's checkout is not part of that checkout.
    if _git(source, "ls-files", "--error-unmatch", "__init__.py") is not None:
        return _state_of(source)
    return _state_of(Path.cwd())


def versions() -> dict[str, object]:
    """Python, platform and package versions, and the plugins with their distributions."""
    return {
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.machine()}",
        "gsa_platform": gsa_platform.__version__,
        "packages": {name: v for name in PACKAGES if (v := _version(name))},
        "plugins": plugin_versions(),
    }


def plugin_versions() -> dict[str, str]:
    """Entry points of the group `gsa_platform`: name -> "distribution version"."""
    found: dict[str, str] = {}
    for entry in metadata.entry_points(group="gsa_platform"):
        owner = entry.dist
        found[entry.name] = f"{owner.name} {owner.version}" if owner else "unknown"
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _state_of(folder: Path) -> GitState | None:
    status = _git(folder, "status", "--porcelain")
    if status is None:
        return None
    commit = (_git(folder, "rev-parse", "--verify", "-q", "HEAD") or "").strip()
    branch = (_git(folder, "symbolic-ref", "--short", "-q", "HEAD") or "").strip()
    diff = _git(folder, "diff", "--no-ext-diff", "--no-color", "HEAD") if commit else ""
    text = (diff or "") + "".join(f"# {line}\n" for line in status.splitlines())
    if len(text) > MAX_DIFF_CHARS:
        text = text[:MAX_DIFF_CHARS] + f"\n# cut: {len(text)} characters in all\n"
    return GitState(commit, branch, bool(status.strip()), text if status.strip() else "")


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None
