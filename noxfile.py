"""Tasks: ``nox`` is what CI runs, ``nox -s NAME`` a part of it. The commands are in ``.ci``."""

import nox

nox.options.sessions = ["ci"]
nox.options.default_venv_backend = "venv"


@nox.session(venv_backend="none")
def ci(session: nox.Session) -> None:
    """Everything, against the built wheel in a fresh environment."""
    session.run(".ci/run", external=True)


@nox.session
def tests(session: nox.Session) -> None:
    """Tests and doctests; arguments after ``--`` go to pytest."""
    session.install("-e", ".[dev]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff, its format, mypy and pyright."""
    session.install("-e", ".[dev]")
    session.run(".ci/lint", external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """The site, in ``docs/_build``."""
    session.install("-e", ".[docs]")
    session.run(".ci/docs", external=True)
