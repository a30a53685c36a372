"""Checks of the repository: `nox -l` lists them, `nox --no-venv` uses the packages at hand."""

import shutil
import sysconfig
import tempfile
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True


def in_venv(session: nox.Session) -> bool:
    """Whether nox made an environment; with --no-venv nothing is installed."""
    return session.virtualenv.venv_backend != "none"


def install(session: nox.Session, *packages: str) -> None:
    if in_venv(session):
        session.install(*packages)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting."""
    install(session, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Static types."""
    install(session, "-e", ".[dev]")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """The tests; arguments after -- go to pytest."""
    install(session, "-e", ".[dev]")
    session.run("pytest", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """A wheel, installed into a clean environment and run away from the checkout."""
    install(session, "build")
    # From an earlier build, setuptools would put files that are no more into the wheel.
    shutil.rmtree("build", ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="gsa-build-") as folder:
        root = Path(folder)
        session.run("python", "-m", "build", "--wheel", "--outdir", str(root / "dist"))
        (wheel,) = (root / "dist").glob("*.whl")
        session.run("python", "-m", "venv", str(root / "env"))
        scripts = root / "env" / ("Scripts" if sysconfig.get_platform()[:3] == "win" else "bin")
        pip = [str(scripts / "python"), "-m", "pip", "install", "--quiet"]
        if in_venv(session):
            session.run(*pip, str(wheel), external=True)
        else:  # the wheel alone, over the dependencies of the environment at hand
            session.run(*pip, "--no-deps", str(wheel), external=True)
            # All of them, because an environment can lie over another one.
            every = "import sys; [print(p) for p in sys.path if p.endswith('-packages')]"
            theirs = session.run("python", "-c", every, silent=True)
            own = "import sysconfig; print(sysconfig.get_path('purelib'))"
            ours = session.run(str(scripts / "python"), "-c", own, silent=True, external=True)
            (Path(str(ours).strip()) / "dependencies.pth").write_text(str(theirs))
        elsewhere = root / "elsewhere"
        elsewhere.mkdir()
        with session.chdir(elsewhere):
            program = str(scripts / "gsa-platform")
            session.run(program, "plugins", "list", external=True)
            session.run(program, "experiment=smoke", external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, with warnings as errors."""
    install(session, "mkdocs-material")
    session.run("mkdocs", "build", "--strict")
