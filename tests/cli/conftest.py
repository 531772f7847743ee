"""Shared by the tests of the command line."""

from __future__ import annotations

import pytest

from patching import patch_all


@pytest.fixture
def demo(monkeypatch):
    """Replaces the demo itself, to test only the command around it."""

    def become(result):
        def run_demo(output, *, seeds, quiet):
            if isinstance(result, BaseException):
                raise result
            return [result(output, seeds, quiet)]

        patch_all(monkeypatch, "celora.studies.demo:run_demo", run_demo)

    return become
