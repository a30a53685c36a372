"""`plugins new` writes packages whose contract tests pass as they stand, and refuses the rest."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gsa_platform.components import SLOTS
from gsa_platform.errors import UserError
from gsa_platform.scaffold import write_package
from gsa_platform.scaffold.new import component_name


def install(root: Path, site: Path) -> dict[str, str]:
    """What pip install leaves behind, as far as Python's import and entry points see it."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    points = project["entry-points"]["gsa_platform"]
    lines = "".join(f"{name} = {target}\n" for name, target in points.items())
    (info / "entry_points.txt").write_text(f"[gsa_platform]\n{lines}")
    environ = {k: v for k, v in os.environ.items() if not k.startswith("GSA_")}
    return environ | {"PYTHONPATH": os.pathsep.join([str(site), str(root)])}


def run(*command: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=cwd, env=env, capture_output=True, text=True
    )


@pytest.mark.parametrize("slot", SLOTS)
def test_a_new_package_passes_its_tests_untouched(slot, tmp_path):
    root = write_package(f"acme-{slot}", slot, tmp_path)
    env = install(root, tmp_path / "site")
    tests = run("pytest", "-q", "-p", "no:cacheprovider", cwd=root, env=env)
    assert tests.returncode == 0, tests.stdout + tests.stderr
    assert " passed" in tests.stdout and " failed" not in tests.stdout
    config = run("gsa_platform", "--cfg", "job", f"{slot}=acme", "-p", slot, cwd=tmp_path, env=env)
    assert f"# @package {slot}\nname: acme\n" in config.stdout, config.stderr


@pytest.mark.parametrize("slot", SLOTS)
def test_a_new_package_is_clean(slot, tmp_path):
    root = write_package("acme-part", slot, tmp_path)

    for path in root.rglob("*.*"):
        text = path.read_text()
        for word in ("__DIST__", "__PKG__", "__NAME__", "__CLASS__", "__SLOT__"):
            assert word not in text, path
    check = ["check", "--isolated", "--line-length", "99", "--select", "E,F,I,UP,B", "."]
    assert run("ruff", *check, cwd=root, env=dict(os.environ)).returncode == 0
    form = run("ruff", "format", "--check", "--isolated", "--line-length", "99", ".",
               cwd=root, env=dict(os.environ))  # fmt: skip
    assert form.returncode == 0, form.stdout


def test_it_refuses_to_overwrite(tmp_path):
    write_package("acme-gate", "gate", tmp_path)
    with pytest.raises(UserError, match="exists already"):
        write_package("acme-gate", "gate", tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Acme Gate", "Type acme-gate"),
        ("acme_gate", "Type acme-gate"),
        ("-x", "Type x"),
        ("json", "'json' is taken"),
        ("class", "'class' is taken"),
        ("dual-gate", "gate=dual is offered by gsa-platform"),
    ],
)
def test_bad_names_are_refused(name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write_package(name, "gate", tmp_path)
    assert not list(tmp_path.iterdir())


def test_names():
    assert component_name("acme-attn") == "acme"
    assert component_name("two-words-gate") == "two_words"
    assert component_name("gate") == "gate"


def test_the_command_line(cli, tmp_path):
    done = cli("plugins", "new", "acme-attn", "--slot", "attention", "--folder", str(tmp_path))
    assert done.returncode == 0 and "pip install -e" in done.stdout
    assert (tmp_path / "acme-attn" / "acme_attn" / "attention.py").is_file()
    for arguments, words in (
        (["acme-attn"], "--slot attention|"),
        (["acme-attn", "--slot", "attn"], "Did you mean 'attention'"),
        ([], "plugins new NAME"),
    ):
        wrong = cli("plugins", "new", *arguments)
        assert wrong.returncode == 2 and words in wrong.stderr
