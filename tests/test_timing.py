from __future__ import annotations

import itertools

import pytest
import torch

from celora import timing
from celora.timing import interleaved, slower_than_float32


def test_contenders_take_turns_and_two_rounds_warm_up() -> None:
    calls: list[str] = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert calls == ["a", "b"] * 5
    for of in times.values():
        assert 0 <= of["p20_ms"] <= of["time_ms"] <= of["p80_ms"]


@pytest.mark.parametrize(("half", "single"), [(5.0, 1.0), (0.5, 1.0)])
def test_a_dtype_is_slower_if_the_fastest_of_its_products_is(
    half: float, single: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = [9.0, 1.0, 3.0, 9.0, 2.0]
    times = itertools.chain([half * of for of in noise], [single * of for of in noise])
    monkeypatch.setattr(timing, "timed", lambda call, device: (call(), next(times))[1])
    slower_than_float32.cache_clear()
    assert slower_than_float32(torch.bfloat16, torch.device("cpu")) == (half > single)
    assert next(times, None) is None
    assert slower_than_float32(torch.bfloat16, torch.device("cpu")) == (half > single)  # measured once a process
    slower_than_float32.cache_clear()
