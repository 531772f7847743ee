from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from celora.machine import timing
from celora.machine.timing import (
    cannot_time,
    disturbed,
    faster_dtype,
    interleaved,
    ratios,
    slower_than_float32,
    time_over_float32,
)
from patching import patch_all

CPU, MPS = torch.device("cpu"), torch.device("mps", 0)


@pytest.fixture(autouse=True)
def _measured_anew() -> Iterator[None]:
    for function in (time_over_float32, cannot_time, timing._disturbed):
        function.cache_clear()
    yield
    for function in (time_over_float32, cannot_time, timing._disturbed):
        function.cache_clear()


def test_contenders_take_turns_and_two_rounds_warm_up() -> None:
    calls: list[str] = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert calls == ["a", "b"] * 5
    for row in times.values():
        assert 0 <= row["p20_ms"] <= row["time_ms"] <= row["p80_ms"]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([4, 4, 4, 4, 4], [2, 2, 2, 2, 2], 0.5),
        # A neighbour slows the first down in most turns: the median alone would say 0.4.
        ([10, 10, 10, 4, 4], [4, 4, 4, 4, 4], 1.0),
        # The second was lucky once: its fastest turn alone would say 0.25.
        ([4, 4, 4, 4, 4], [8, 8, 1, 8, 8], 2.0),
    ],
)
def test_neither_luck_nor_a_neighbour_makes_a_slower_one_look_faster(
    first: list[float], second: list[float], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = {"first": iter([9, 9, *first]), "second": iter([9, 9, *second])}
    patch_all(monkeypatch, "celora.machine.timing:timed", lambda call, device: next(call()))
    found = ratios({name: (lambda of=of: of) for name, of in taken.items()}, repeats=5, device=CPU)
    assert found == {"first": 1.0, "second": expected}


def machine(
    monkeypatch: pytest.MonkeyPatch, half: float, load: Callable[[int], float] = lambda turn: 1.0
) -> list[torch.dtype]:
    """A machine on which bfloat16 products take `half` times as long as float32's.

    Another load slows turn i down by `load(i)`. Returns the dtypes that it was asked to multiply.
    """
    asked: list[torch.dtype] = []

    def took(call: Callable[[], torch.Tensor], device: torch.device) -> float:
        dtype = call.args[0].dtype  # type: ignore[attr-defined]
        asked.append(dtype)
        return (half if dtype == torch.bfloat16 else 1.0) * load(len(asked) - 1)

    patch_all(monkeypatch, "celora.machine.timing:timed", took)
    patch_all(monkeypatch, "celora.machine.timing:_REST", 0)
    return asked


@pytest.mark.parametrize(
    ("half", "slower"), [(16.0, True), (1.6, True), (1.4, False), (1.1, False), (1.0, False), (0.5, False)]
)
def test_float32_has_to_be_clearly_faster(half: float, slower: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 must be clearly faster, because it takes twice the memory."""
    asked = machine(monkeypatch, half)
    assert slower_than_float32(torch.bfloat16, CPU) is slower
    assert time_over_float32(torch.bfloat16, CPU) == pytest.approx(half)
    assert faster_dtype() == ("float32" if slower else "bfloat16")
    assert asked == [torch.bfloat16, torch.float32] * 10  # measured once a process: one turn warms up, nine count


def bursts(seed: int) -> Callable[[int], float]:
    """Another load slows down two turns of five, by up to 30 times."""
    generator = torch.Generator().manual_seed(seed)
    slow = torch.where(torch.rand(100, generator=generator) < 0.4, 1 + 29 * torch.rand(100, generator=generator), 1.0)
    return lambda turn: float(slow[turn])


LOADS: dict[str, Callable[[int], float]] = {
    "half of the machine taken away": lambda turn: 2.0,
    "less and less": lambda turn: 1 + 10 / (1 + turn),
    "more and more": lambda turn: 1 + turn / 4,
    "one turn of each": lambda turn: 20.0 if turn in (4, 7) else 1.0,
    "every fourth": lambda turn: 25.0 if turn % 4 == 0 else 1.0,  # every second turn is in bfloat16
    "every sixth": lambda turn: 25.0 if turn % 6 == 3 else 1.0,  # only in float32
    **{f"bursts {seed}": bursts(seed) for seed in range(40)},
}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("half", [0.5, 8.0])
def test_what_else_the_machine_does_does_not_decide(half: float, load: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = machine(monkeypatch, half, LOADS[load])
    assert slower_than_float32(torch.bfloat16, CPU) == (half > 1)
    assert len(asked) <= 2 * 46


def test_an_unclear_measurement_goes_on_and_then_keeps_half_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that slows down every second turn must not decide: the fastest turns still take equally long."""
    asked = machine(monkeypatch, 1.0, lambda turn: 5.0 if turn % 2 == 0 and turn > 2 else 1.0)
    assert not slower_than_float32(torch.bfloat16, CPU)
    assert len(asked) == 2 * 46


def test_a_dtype_that_the_device_refuses_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full memory refuses no dtype."""
    refuse = Mock(side_effect=torch.OutOfMemoryError("no memory"))
    patch_all(monkeypatch, "celora.machine.timing:timed", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        time_over_float32(torch.bfloat16, CPU)
    refuse.side_effect = TypeError("BFloat16 is not supported on MPS")
    assert time_over_float32(torch.bfloat16, CPU) == math.inf


class Accelerator:
    """An MPS device with its own clock instead of the machine's. A launch takes 1 ms, a large product 100 ms more.

    If `waits`, waiting for the device lets the time of its work pass. Nothing else does.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *, waits: bool = True) -> None:
        self.now = self.done = 0.0
        self.waits = waits
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
        patch.setattr(torch.accelerator, "synchronize", self.synchronize)
        patch.setattr(timing.time, "perf_counter", lambda: self.now)
        patch.setattr(timing.torch, "ones", lambda *size, device: _Square(self, size[0]))

    def synchronize(self, device: torch.device) -> None:
        assert device == MPS
        if self.waits:
            self.now = max(self.now, self.done)

    def launch(self, seconds: float) -> None:
        self.now += 0.001
        self.done = max(self.now, self.done) + seconds


class _Square:
    def __init__(self, device: Accelerator, size: int) -> None:
        self.device, self.size = device, size

    def __matmul__(self, other: _Square) -> _Square:
        self.device.launch(0.1 if self.size > 1000 else 0.0)
        return self


def test_a_time_is_that_of_the_work_and_of_nothing_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Accelerator(monkeypatch)
    device.launch(7.0)
    for _ in range(2):
        assert timing.timed(lambda: device.launch(0.25), MPS) == pytest.approx(251)
    assert timing.timed(lambda: device.launch(0.25), CPU) == pytest.approx(1)  # the CPU needs no waiting


def test_CUDA_is_busy_before_the_first_call_and_waited_for_after_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            self.at = 0

        def record(self) -> None:
            said.append("mark")
            self.at = len(said)

        def synchronize(self) -> None:
            said.append("wait")

        def elapsed_time(self, end: Event) -> int:
            return end.at - self.at

    patch_all(monkeypatch, "celora.borrowed:borrow", lambda name: lambda cycles: said.append(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert timing.laps((lambda: said.append("a"), lambda: said.append("b")), torch.device("cuda")) == [2, 2]
    assert said == ["torch:cuda._sleep", "mark", "a", "mark", "b", "mark", "wait"]
    said.clear()
    assert timing.timed(lambda: said.append("a"), CPU) < 1000  # by the clock, though there is a GPU
    assert said == ["a"]


def test_a_device_that_is_waited_for_can_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cannot_time(CPU) == cannot_time(torch.device("cuda", 1)) == ""
    Accelerator(monkeypatch)
    assert cannot_time(MPS) == ""


@pytest.mark.parametrize("why", ["no longer than a small one", "torch.accelerator does not know it"])
def test_nothing_is_timed_where_times_are_those_of_launches(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why.startswith("no longer"):
        Accelerator(monkeypatch, waits=False)
    assert why in cannot_time(MPS)


@pytest.mark.parametrize(
    ("shares", "numbers", "allowed", "threads", "expected"),
    [
        ([3.0, 5.0], "01", {0, 1}, 2, ""),
        ([100.0, 10.0], "01", {0, 1}, 2, "other programs use 55% of the processors"),
        ([100.0, 10.0], "01", {0, 1}, 1, ""),  # one thread has a processor of its own
        ([100.0, 10.0, 0.0, 0.0], "0123", {2, 3}, 2, ""),  # this process may not use those that are busy
        ([100.0, 100.0], "01", {0, 1}, 8, "other programs use 100% of the processors"),
        ([100.0, 0.0, 0.0, 0.0], "0246", {2, 4, 6}, 3, ""),  # half are offline
        ([100.0, 100.0], "01", {6, 7}, 2, "other programs use 100% of the processors"),  # a container's own numbers
        ([100.0, 100.0], "", {0, 1}, 2, "other programs use 100% of the processors"),  # nobody says
    ],
)
def test_others_disturb_where_fewer_processors_are_free_than_there_are_threads(
    shares: list[float],
    numbers: str,
    allowed: set[int],
    threads: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    stat = tmp_path / "stat"
    if numbers:
        stat.write_text("cpu  1 2 3\n" + "".join(f"cpu{number} 1 2 3\n" for number in numbers) + "intr 4\n")
    monkeypatch.setattr(timing, "_STAT", stat)
    watched = SimpleNamespace(cpu_percent=lambda seconds, percpu: shares)
    monkeypatch.setattr(timing, "psutil", watched)
    monkeypatch.setattr(timing.os, "sched_getaffinity", lambda process: allowed, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    now = 0.0
    monkeypatch.setattr(timing, "time", SimpleNamespace(monotonic=lambda: now))
    assert disturbed().startswith(expected)
    assert bool(disturbed()) == bool(expected)
    assert disturbed(torch.device("cuda")) == ""
    shares[:] = [0.0] * len(shares)
    now = 9.0
    assert bool(disturbed()) == bool(expected)  # what was seen is believed for a while
    now = 11.0
    assert disturbed() == ""
