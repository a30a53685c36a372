"""The platform imports neither kernels nor plugins, and works without triton and xformers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import gsa_platform

FORBIDDEN = {"triton", "xformers", "gsa_kernels", "gsa_plugins"}
IMPORT_ALL = """
import importlib, pkgutil, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("triton", "xformers"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
import gsa_platform
names = [m.name for m in pkgutil.walk_packages(gsa_platform.__path__, "gsa_platform.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
bad = sorted({n.partition(".")[0] for n in sys.modules} & {"gsa_kernels", "gsa_plugins"})
assert not bad, bad
print(len(names))
"""


def platform_files() -> list[Path]:
    return sorted(Path(gsa_platform.__file__).parent.rglob("*.py"))


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def test_no_forbidden_import_anywhere():
    assert len(platform_files()) > 10
    wrong = {f.name: imported(f) & FORBIDDEN for f in platform_files()}
    assert not {name: found for name, found in wrong.items() if found}


def test_every_module_imports_without_triton_and_xformers(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


def test_the_package_itself_is_light():
    code = (
        "import sys, gsa_platform;"
        "heavy = {'torch', 'hydra', 'mlflow', 'lightning', 'omegaconf'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
