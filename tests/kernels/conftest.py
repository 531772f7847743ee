"""Fixtures of the kernels' tests."""

from __future__ import annotations

import pytest

from tiers import use_tier


@pytest.fixture(autouse=True)
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The tier of the kernels. Tests that do not run in each tier get the one that would be used anyway."""
    if not hasattr(request, "param"):
        return None
    use_tier(monkeypatch, request.param)
    return str(request.param)
