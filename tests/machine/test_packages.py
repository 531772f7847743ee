"""The versions of installed packages."""

from __future__ import annotations

import torch

from celora.machine.packages import package_version


def test_versions_of_what_is_installed() -> None:
    assert package_version("torch") == torch.__version__
    assert package_version("not-a-package") is None
