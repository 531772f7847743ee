"""Fixtures of the kernels' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tiers import use_tier


@pytest.fixture
def use_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of torch's threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The tier of the kernels. Tests that do not run in each tier get the one that would be used anyway."""
    if not hasattr(request, "param"):
        return None
    use_tier(monkeypatch, request.param)
    return str(request.param)
