"""Checks of the repository: `nox -l` lists them, `nox --no-venv` uses the packages at hand."""

import functools
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
def gpu(session: nox.Session) -> None:
    """The tests that need a GPU, and those of the kernels, compiled for it."""
    install(session, "-e", ".[dev]")
    session.run("pytest", "-m", "gpu or kernel", *session.posargs)


@nox.session
def sanitize(session: nox.Session) -> None:
    """compute-sanitizer on a handful of kernel tests; needs a GPU and the CUDA toolkit."""
    install(session, "-e", ".[dev]")
    session.run("python", "experiments/speed/sanitize.py", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """A wheel, installed into a clean environment and run away from the checkout."""
    install(session, "build")
    with tempfile.TemporaryDirectory(prefix="gsa-build-") as folder:
        scripts = environment(session, Path(folder), wheel(session, ".", Path(folder)))
        with session.chdir(elsewhere(Path(folder))):
            program = str(scripts / "gsa-platform")
            session.run(program, "plugins", "list", external=True)
            session.run(program, "experiment=smoke", external=True)


@nox.session
def plugin_example(session: nox.Session) -> None:
    """Our wheel and a third party's, installed together into a clean environment: the plugin's
    contract tests, and a training with it from the command line."""
    install(session, "build")
    with tempfile.TemporaryDirectory(prefix="gsa-plugin-") as folder:
        root = Path(folder)
        # A copy, since setuptools builds in the source folder.
        example = shutil.copytree(Path("examples", "acme-attn"), root / "acme-attn")
        wheels = wheel(session, ".", root), wheel(session, str(example), root)
        scripts = environment(session, root, *wheels, extras=("pytest",))
        python, few = str(scripts / "python"), {"OMP_NUM_THREADS": "1"}
        tests = str(shutil.move(example / "tests", root / "tests"))
        run = functools.partial(session.run, external=True, env=few)
        with session.chdir(elsewhere(root)):
            run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests)
            run(python, "-m", "gsa_platform", "plugins", "new", "other-gate", "--slot", "gate")
            run(python, "-m", "gsa_platform", "plugins", "show", "moba")
            run(python, "-m", "gsa_platform", "experiment=moba_smoke", "attention.top_k=4")


def wheel(session: nox.Session, source: str, folder: Path) -> Path:
    """The wheel of a project, built into a folder of its own."""
    # From an earlier build, setuptools would put files that are no more into the wheel.
    shutil.rmtree(Path(source, "build"), ignore_errors=True)
    out = Path(tempfile.mkdtemp(dir=folder))
    session.run("python", "-m", "build", "--wheel", "--outdir", str(out), source)
    (found,) = out.glob("*.whl")
    return found


def environment(
    session: nox.Session, folder: Path, *wheels: Path, extras: tuple[str, ...] = ()
) -> Path:
    """The scripts folder of a new environment with these wheels, and with their dependencies or,
    under --no-venv, over those of the environment at hand."""
    session.run("python", "-m", "venv", str(folder / "env"))
    scripts = folder / "env" / ("Scripts" if sysconfig.get_platform()[:3] == "win" else "bin")
    python = str(scripts / "python")
    pip = [python, "-m", "pip", "install", "--quiet"]
    names = [str(path) for path in wheels]
    if in_venv(session):
        session.run(*pip, *names, *extras, external=True)
    else:
        session.run(*pip, "--no-deps", *names, external=True)
        # All of them, because an environment can lie over another one.
        every = "import sys; [print(p) for p in sys.path if p.endswith('-packages')]"
        theirs = session.run("python", "-c", every, silent=True)
        own = "import sysconfig; print(sysconfig.get_path('purelib'))"
        ours = session.run(python, "-c", own, silent=True, external=True)
        (Path(str(ours).strip()) / "dependencies.pth").write_text(str(theirs))
    return scripts


def elsewhere(folder: Path) -> Path:
    """An empty folder away from the checkout."""
    path = folder / "elsewhere"
    path.mkdir()
    return path


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, with warnings as errors."""
    install(session, "mkdocs-material")
    session.run("mkdocs", "build", "--strict")
