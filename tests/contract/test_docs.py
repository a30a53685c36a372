"""The plugin of the documentation is as small as it says, passes the kit and trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_scaffold import install, run

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def count(text: str) -> int:
    """Lines that are neither empty nor a comment."""
    lines = [line.strip() for line in text.splitlines()]
    return sum(bool(line) and not line.startswith("#") for line in lines)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    root = tmp_path / "acme"
    root.mkdir()
    (root / "acme_attn.py").write_text(blocks("plugins.md", "python")[0])
    (root / "pyproject.toml").write_text(blocks("plugins.md", "toml")[0])
    return root


def test_a_minimal_attention_is_15_lines_of_python_and_10_of_toml():
    python, toml = blocks("plugins.md", "python")[0], blocks("plugins.md", "toml")[0]
    assert count(python) == 15 and "These 15 lines" in (DOCS / "plugins.md").read_text()
    assert count(toml) <= 10
    assert all(len(line) < 100 for line in python.splitlines())


def test_it_passes_the_kit_and_trains(package, tmp_path):
    env = install(package, tmp_path / "site") | {"OMP_NUM_THREADS": "1"}
    checked = run("gsa_platform", "plugins", "check", "acme", cwd=tmp_path, env=env)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    smoke = ["experiment=smoke", "context=128", "train.steps=1", "tracking=none"]
    trained = run("gsa_platform", *smoke, "attention=acme", cwd=tmp_path, env=env)
    assert trained.returncode == 0, trained.stderr


def test_the_table_of_wrong_components_is_complete():
    from test_broken_components import CAUGHT

    table = (DOCS / "kit.md").read_text().partition("## It bites")[2].partition("## Every")[0]
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \|$", table, re.MULTILINE)
    assert sorted(rows) == sorted(right.split("-")[-1] for right, _, _ in CAUGHT.values())


def test_every_hook_is_documented():
    from gsa_platform.hookspecs import Hooks

    text = (DOCS / "hooks.md").read_text()
    for name in dir(Hooks):
        if name.startswith("gsa_"):
            assert f"`{name}" in text, name
