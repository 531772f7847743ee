"""Kernels on Python's threads: where torch has no OpenMP runtime to share. None of these tests needs such a torch."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from celora.kernels import operations
from celora.kernels.c import dot, rows
from celora.kernels.c.team import Team
from celora.kernels.c.tier import Kernels
from patching import patch_all
from tiers import LIBRARY, TIERS, WITH_DOTS

needs_kernels = pytest.mark.skipif(not TIERS, reason="no compiled kernels")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    assert LIBRARY is not None
    with monkeypatch.context() as patch:
        patch.setattr("celora.kernels.c.tier._RUNTIMES", ())
        kernels = Kernels(LIBRARY, TIERS[-1])
        assert not kernels.threaded
        patch_all(patch, "celora.kernels.c.library:library", lambda: kernels)
        yield kernels
    assert Kernels(LIBRARY, TIERS[-1]).threaded  # from here on, everything is as before


def _results() -> list[Tensor]:
    """Of kernels whose threads share loops, take pieces, and wait for each other."""
    x = torch.randn(70, 96, generator=torch.Generator().manual_seed(0))
    found = [rows.squared_row_norms(x), *operations.quantise_rows(x)]
    found += operations.rms_norm(x, torch.ones(96), offset=0.0, eps=1e-5, rounds=False)
    p, z = x[:, :16].bfloat16().contiguous(), x.bfloat16()
    found.append(operations.transposed_product(p, z))
    if WITH_DOTS:
        scale = x[:64].abs().amax(0) / 127
        packed = dot.pack_columns(x[:64].contiguous(), 1 / scale)
        out = torch.empty(70, 96)
        dot.gathered_product(
            x[:, :64].contiguous(), packed, scale, out, index=None, position=None, factors=None, fill=False
        )
        found.append(out)
    return found


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_results_are_those_of_torchs_threads(
    threads: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    expected = _results()
    request.getfixturevalue("alone")
    for _ in range(3):
        assert all(map(torch.equal, _results(), expected))


@needs_kernels
def test_a_kernel_beside_another_one_has_one_thread(alone: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    expected, found = _results(), dict[int, list[Tensor]]()
    callers = [threading.Thread(target=lambda i=i: found.update({i: _results()})) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sorted(found) == [0, 1, 2, 3]
    assert all(all(map(torch.equal, results, expected)) for results in found.values())


class _Library:
    """Stands for the loaded kernels. `celora_run_part` calls `act` with the thread, and adds to `shared`."""

    def __init__(self, act: Any) -> None:
        def celora_run_part(kernel: int, slots: bytes, shared: Any, thread: int, threads: int) -> int:
            return int(act(shared, thread, threads))

        self.celora_run_part: Any = celora_run_part


def test_every_part_has_a_thread_of_its_own_and_the_first_ones_number_is_returned() -> None:
    meeting, seen = threading.Barrier(4), dict[int, int]()

    def act(shared: Any, thread: int, threads: int) -> int:
        seen[thread] = threads
        meeting.wait(timeout=60)  # breaks unless all run at the same time
        return thread + 10

    team = Team(_Library(act))  # type: ignore[arg-type]
    for _ in range(3):
        seen.clear()
        assert team.run(0, b"", 4) == 10
        assert seen == dict.fromkeys(range(4), 4)


def test_ctrl_c_between_two_parts_leaves_no_part_waiting() -> None:
    came = ctypes.c_int64(0)

    def act(shared: Any, thread: int, threads: int) -> int:
        if not thread:
            raise KeyboardInterrupt
        while shared[1] < threads:  # as celora_meet does
            threading.Event().wait(0.001)
        came.value += 1
        return 0

    team = Team(_Library(act))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        team.run(0, b"", 3)
    assert came.value == 2  # before anything else happens to the tensors that the parts write to
    with pytest.raises(KeyboardInterrupt):
        team.run(0, b"", 3)
    assert came.value == 4


def test_a_forked_process_and_another_number_get_threads_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set[str]()

    def act(shared: Any, thread: int, threads: int) -> int:
        names.add(threading.current_thread().name)
        return 0

    team = Team(_Library(act))  # type: ignore[arg-type]
    team.run(0, b"", 2)
    first = team._threads(1)
    assert team._threads(1) is first
    assert team._threads(2) is not first
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        assert team._threads(1) is not first
    assert len(names) == 2
