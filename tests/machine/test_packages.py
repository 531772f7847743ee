"""The versions of installed packages."""

from __future__ import annotations

import torch

from celora.machine.packages import package_version


def test_versions_of_what_is_installed() -> None:
    assert str(package_version("torch")).partition("+")[0] == torch.__version__.partition("+")[0]
    assert package_version("not-a-package") is None
