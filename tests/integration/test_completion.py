"""Completion in bash: what is offered, and that bash puts it where it belongs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gsa_platform.completion import candidates

pytestmark = pytest.mark.usefixtures("fresh_registry")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("gsa-platform pl", ["plugins", "plugins_path="]),
        ("gsa-platform experiment=", ["experiment=gsa_128k", "experiment=smoke"]),
        ("gsa-platform experiment=smoke gate=d", ["gate=dual"]),
        ("gsa-platform check gate=d", ["gate=dual"]),
        ("gsa-platform -m gate=dual,o", ["gate=dual,output"]),
        ("gsa-platform attention", ["attention.", "attention="]),
        ("gsa-platform sparsity.", ["sparsity.k=", "sparsity.sinks=", "sparsity.window="]),
        ("gsa-platform attention=dense attention.", ["attention.backend="]),
        ("gsa-platform attention=absent attention.mo", ["attention.mode="]),
        ("gsa-platform attention.mode=t", ["attention.mode=tile", "attention.mode=token"]),
        ("gsa-platform model.rope_scaling.k", ["model.rope_scaling.kind="]),
        ("gsa-platform model.qk_norm=", ["model.qk_norm=false", "model.qk_norm=true"]),
        ("gsa-platform optim.schedule=w", ["optim.schedule=wsd"]),
        ("gsa-platform plugins ", ["check", "list", "matrix", "new", "show"]),
        ("gsa-platform plugins check ga", ["gated_lightning"]),
        ("gsa-platform plugins new acme --slot g", ["gate"]),
        ("gsa-platform plugins show ga", ["gated_lightning"]),
        ("gsa-platform runs doctor --", ["--fix"]),
        ("gsa-platform eval ch", ["checkpoint="]),
        ("gsa-platform bench ", ["attention", "capture", "indexer"]),
        ("gsa-platform bench attention --se", ["--seconds", "--seq-len", "--sequences"]),
        ("gsa-platform bench attention --mode t", ["tile", "token"]),
        ("gsa-platform bench absent --", []),
        ("gsa-platform --cf", ["--cfg"]),
        ("gsa-platform --cfg ", ["all", "hydra", "job"]),
        ("gsa-platform help ", []),
        ("gsa-platform seed=", []),
        ("gsa-platform absent.", []),
    ],
)
def test_candidates(line: str, offered: list[str]) -> None:
    assert candidates(line) == offered


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A folder with the console script."""
    script = tmp_path / "gsa-platform"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gsa_platform "$@"\n')
    script.chmod(0o755)
    return tmp_path


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("breaks", "reply"), [(" =:", "gsa|gsa_16"), (" ", "attention=gsa|attention=gsa_16")]
)
def test_bash_replaces_what_it_splits_off(program: Path, breaks: str, reply: str) -> None:
    line = "gsa-platform attention=g"
    code = (
        'eval "$(gsa-platform --shell-completion install=bash)"\n'
        f"COMP_WORDBREAKS='{breaks}' COMP_LINE='{line}' COMP_POINT={len(line)}\n"
        "_gsa_platform gsa-platform; IFS='|'; echo \"${COMPREPLY[*]}\"\n"
        "complete -p gsa-platform\n"
    )
    environ = os.environ | {"PATH": f"{program}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", code], env=environ, capture_output=True, text=True)
    assert done.stdout.startswith(reply), done.stdout + done.stderr
    assert "-F _gsa_platform gsa-platform" in done.stdout


def test_a_query_imports_no_torch() -> None:
    code = (
        "import sys; from gsa_platform.cli import main;"
        "rc = main(['--shell-completion', 'query=bash']);"
        "sys.exit(rc or (3 if {'torch', 'mlflow', 'lightning'} & set(sys.modules) else 0))"
    )
    environ = os.environ | {"COMP_LINE": "gsa-platform attention=d"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"attention=dense\n")
