"""Writes a plugin package whose contract tests pass as it stands."""

from __future__ import annotations

import importlib.util
import keyword
import re
from collections.abc import Iterator
from pathlib import Path

from gsa_platform import registry
from gsa_platform.components import SLOTS
from gsa_platform.errors import UserError, unknown

USAGE = "Usage: gsa-platform plugins new NAME --slot SLOT [--folder FOLDER]"
# Endings of a package's name that say its slot, not its component.
ENDINGS = ("attn", "attention", "indexer", "sparsity", "budget", "gate", "objective", "loss")


def new(arguments: list[str]) -> int:
    """Write the package and say what to do next. Raises UserError for a name, slot or folder that
    cannot be used."""
    name, slot, folder = _parse(arguments)
    root = write_package(name, slot, Path(folder))
    component = component_name(name)
    shown = root if folder != "." else root.name
    print(
        f"written  {shown}: {slot}={component}\n"
        f"next     pip install -e {shown}\n"
        f"         pytest {shown}\n"
        f"         gsa-platform plugins check {component} --slot {slot}\n"
        f"         gsa-platform experiment=smoke {slot}={component}"
    )
    return 0


def write_package(name: str, slot: str, folder: Path) -> Path:
    """Write the package `name` for a slot into a new folder of that name; returns the folder."""
    if slot not in SLOTS:
        raise UserError(unknown("slot", slot, SLOTS))
    _check_names(name, slot)
    root = folder / name
    if root.exists():
        raise UserError(f"{root} exists already. Choose another name, or another --folder.")
    words = {
        "__DIST__": name,
        "__PKG__": name.replace("-", "_"),
        "__NAME__": component_name(name),
        "__CLASS__": "".join(w.capitalize() for w in component_name(name).split("_")),
        "__SLOT__": slot,
    }
    for path, text in _files(slot):
        for word, value in words.items():
            path, text = path.replace(word, value), text.replace(word, value)
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    return root


def component_name(name: str) -> str:
    """`acme` for acme-attn, `two_words` for two-words."""
    words = name.split("-")
    if len(words) > 1 and words[-1] in ENDINGS:
        words.pop()
    return "_".join(words)


def _check_names(name: str, slot: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        fixed = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-0123456789") or "acme-attn"
        raise UserError(
            f"'{name}' is no name for a package: lower-case letters, digits and single hyphens, "
            f"a letter first. Type {fixed}, for example."
        )
    package, component = name.replace("-", "_"), component_name(name)
    if keyword.iskeyword(package) or importlib.util.find_spec(package) is not None:
        raise UserError(f"the module name '{package}' is taken. Choose another name.")
    if component in registry.get().names(slot):
        owner = registry.get().entry(slot, component).plugin.distribution
        raise UserError(f"{slot}={component} is offered by {owner} already. Choose another name.")


def _files(slot: str) -> Iterator[tuple[str, str]]:
    """(path, text) of each file, with the words of `write_package` in them."""
    here = Path(__file__).parent
    for path, template in (
        ("pyproject.toml", "pyproject.toml.txt"),
        ("README.md", "README.md.txt"),
        ("__PKG__/__init__.py", f"{slot}_record.py.txt"),
        (f"__PKG__/{slot}.py", f"{slot}.py.txt"),
        ("tests/test_contract.py", "test_contract.py.txt"),
    ):
        yield path, (here / template).read_text(encoding="utf-8")


def _parse(arguments: list[str]) -> tuple[str, str, str]:
    names: list[str] = []
    options = {"--slot": "", "--folder": "."}
    rest = list(arguments)
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        if key in options:
            options[key] = value if equals else (rest.pop(0) if rest else "")
        elif key.startswith("-") or equals:
            raise UserError(f"plugins new does not take '{key}'.\n  {USAGE}")
        else:
            names.append(key)
    if len(names) != 1:
        raise UserError(USAGE)
    if not options["--slot"]:
        raise UserError(f"plugins new needs --slot {'|'.join(SLOTS)}.\n  {USAGE}")
    return names[0], options["--slot"], options["--folder"] or "."
