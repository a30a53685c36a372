"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU, Triton kernels run in Triton's interpreter; it must know before the first import.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

COMPONENT = """
from dataclasses import dataclass
from gsa_platform import Capabilities, Component, hookimpl

@dataclass
class Config:
    name: str = "{name}"
    top_k: int = 64  # keys per query

@hookimpl
def gsa_register_attention():
    return Component("{name}", "{module}:Built", Config, "A test component")

class Built:
    def __init__(self, config, dims):
        self.config, self.dims = config, dims
"""

PluginWriter = Callable[..., Path]
CliRunner = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def plugin(tmp_path: Path) -> PluginWriter:
    """Write an installed-looking plugin (module and dist-info) and return its folder.

    ``plugin("acme")`` offers attention=acme; ``plugin("acme", source)`` is the given module.
    """
    site = tmp_path / "site"
    site.mkdir()

    def write(module: str, source: str | None = None, *, name: str = "", dist: str = "") -> Path:
        source = source or COMPONENT.format(name=name or module, module=module)
        (site / f"{module}.py").write_text(textwrap.dedent(source))
        dist = dist or f"{module}-dist"
        info = site / f"{dist.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[gsa_platform]\n{module} = {module}\n")
        return site

    return write


@pytest.fixture
def cli(tmp_path: Path) -> CliRunner:
    """Run ``python -m gsa_platform`` in a fresh process, in an empty folder."""
    work = tmp_path / "work"
    work.mkdir()

    def run(
        *arguments: str, site: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        ours = ("GSA_", "TRITON_INTERPRET")  # a user has not set them
        environ = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        if site is not None:
            environ["PYTHONPATH"] = str(site)
        return subprocess.run(
            [sys.executable, "-m", "gsa_platform", *arguments],
            cwd=work,
            env=environ | variables,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Run the test on a CPU and, marked `gpu`, on a GPU."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture
def fresh_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Load the plugins anew inside the test, and again after it; Hydra forgets them too."""
    from hydra.core.config_store import ConfigStore

    from gsa_platform import registry
    from gsa_platform.components import SLOTS

    for name in ("GSA_PLUGIN_PATH", "GSA_DISABLE_PLUGINS", "GSA_STRICT_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    registry.reset()
    yield
    registry.reset()
    for group in (*SLOTS, "data"):
        ConfigStore.instance().repo.pop(group, None)  # registered again when next needed
