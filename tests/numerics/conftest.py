"""The two ways to compute on a CPU: with compiled kernels, and with torch alone."""

from __future__ import annotations

import pytest

from without import take_path


@pytest.fixture(params=["compiled", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return take_path(monkeypatch, request.param)
