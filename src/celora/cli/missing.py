"""Says what the command line lacks where celora was installed as a library: `pip install celora` brings no application.

The packages and their lowest versions are those of the extra `app` in pyproject.toml. A library's environment may have
some of them, older than the command line needs. `celora doctor` is for every installation: it needs typer alone, which
most versions of Transformers bring.
"""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement


def missing(command: str = "") -> str:
    """One line with the packages that `celora[app]` would install or replace, and how; '' if the command needs none."""
    try:
        needs = map(Requirement, metadata.requires("celora") or ())
        asked = [need for need in needs if command != "doctor" or need.name == "typer"]
        lacks = [found for need in asked if (found := _lacks(need))]
    except metadata.PackageNotFoundError:  # celora runs from its source, and nobody has written down what it needs
        return ""
    if not lacks:
        return ""
    return (
        f'the command line needs {", ".join(lacks)}; run: pip install "celora[app]" (in an environment of its own, if '
        "other programs here need what is installed)"
    )


def _lacks(need: Requirement) -> str:
    """The requirement of the application that is not met, and what is there instead; '' if it is met."""
    if need.marker is not None and not need.marker.evaluate({"extra": "app"}):
        return ""
    try:
        version = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        return need.name
    return "" if need.specifier.contains(version, prereleases=True) else f"{need.name}{need.specifier} (not {version})"
