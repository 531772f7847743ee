"""What the first of several processes makes for all of them, and what the others are told if it fails."""

from __future__ import annotations

from typing import Any

import pytest

from celora.errors import CELoraError
from celora.machine import processes


def fail() -> None:
    raise CELoraError("no room")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """This process is the first of two; what it tells the other."""
    told: list[Any] = []
    monkeypatch.setattr(processes, "in_company", lambda: True)
    monkeypatch.setattr(processes.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(processes, "from_first", lambda value: told.append(value) or value)
    return told


def test_alone_it_is_made_here() -> None:
    assert processes.made_by_first(lambda: 3) == 3
    with pytest.raises(CELoraError, match=r"^no room$"):
        processes.made_by_first(fail)


def test_processes_that_do_not_know_each_other_yet_are_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert processes.made_by_first(lambda: 3) == 3
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CELoraError, match=r"do not know each other yet.*call this after Accelerator\(\)"):
        processes.made_by_first(lambda: 3)
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes, "in_company", lambda: False)
    assert processes.made_by_first(lambda: 3) == 3


def test_what_fails_in_the_first_fails_in_all(told: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The others would wait for the first one until the process group gives up."""
    assert processes.made_by_first(lambda: 3) == 3
    with pytest.raises(CELoraError, match=r"^no room$"):
        processes.made_by_first(fail)
    first, second = told
    monkeypatch.setattr(processes.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(processes, "from_first", lambda value: first)
    assert processes.made_by_first(fail) == 3
    monkeypatch.setattr(processes, "from_first", lambda value: second)
    with pytest.raises(CELoraError, match="the first process could not go on: no room"):
        processes.made_by_first(fail)
