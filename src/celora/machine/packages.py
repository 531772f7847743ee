"""Which packages are installed here, and in which versions."""

from __future__ import annotations

from importlib import metadata

PACKAGES = ("celora", "torch", "transformers", "peft", "trl", "accelerate", "datasets")


def package_version(name: str) -> str | None:
    """The version of an installed package; None if it is not installed, as where celora runs from its sources."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
