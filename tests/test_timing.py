from __future__ import annotations

from celora.timing import interleaved


def test_contenders_take_turns_and_two_rounds_warm_up() -> None:
    calls: list[str] = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert calls == ["a", "b"] * 5
    for of in times.values():
        assert 0 <= of["p20_ms"] <= of["time_ms"] <= of["p80_ms"]
