"""Which features the installed versions of other libraries have. A test of a newer feature says from which version."""

from __future__ import annotations

from importlib import metadata

from packaging.version import Version


def before(package: str, version: str) -> bool:
    """Whether an older version of the package is installed."""
    return Version(metadata.version(package)) < Version(version)
