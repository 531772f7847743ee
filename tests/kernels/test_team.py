"""Kernels on Python's threads: where torch has no OpenMP runtime to share. None of these tests needs such a torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from celora.kernels import operations
from celora.kernels.c import dot, rows
from celora.kernels.c.tier import Kernels, load
from patching import patch_all
from tiers import LIBRARY, WITH_DOTS

needs_kernels = pytest.mark.skipif(load()[0] is None, reason="no compiled kernels")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    assert LIBRARY is not None
    usual, _ = load()
    assert usual is not None
    with monkeypatch.context() as patch:
        patch.setattr("celora.kernels.c.tier._RUNTIMES", ())
        kernels = Kernels(LIBRARY, usual.tier)
        assert not kernels.threaded
        patch_all(patch, "celora.kernels.c.library:library", lambda: kernels)
        yield kernels
    assert Kernels(LIBRARY, usual.tier).threaded == usual.threaded  # from here on, everything is as before


def _results() -> list[Tensor]:
    """Of kernels whose threads share loops, take pieces, and wait for each other."""
    x = torch.randn(70, 96, generator=torch.Generator().manual_seed(0))
    found = [rows.squared_row_norms(x), *operations.quantise_rows(x)]
    found += operations.rms_norm(x, torch.ones(96), offset=0.0, eps=1e-5, rounds=False)
    p, z = x[:, :16].bfloat16().contiguous(), x.bfloat16()
    found.append(operations.transposed_product(p, z))
    if load()[0].tier in WITH_DOTS:  # type: ignore[union-attr]
        scale = x[:64].abs().amax(0) / 127
        packed = dot.pack_columns(x[:64].contiguous(), 1 / scale)
        out = torch.empty(70, 96)
        dot.gathered_product(x[:, :64].contiguous(), packed, scale, out, index=None, position=None, fill=False)
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


@needs_kernels
def test_ctrl_c_before_the_first_part_leaves_no_part_waiting(alone: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    x, out = torch.randn(70, 96), torch.full((70,), 7.0)
    team, real = alone._team, alone._team._part

    def interrupted(kernel: int, slots: bytes, shared: Any, thread: int, threads: int) -> int:
        if not thread:
            raise KeyboardInterrupt
        return int(real(kernel, slots, shared, thread, threads))

    expected = _results()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *_, **__: out)
        patch.setattr(team, "_part", interrupted)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                rows.squared_row_norms(x)
    assert all(map(torch.equal, _results(), expected))  # all threads are there again
    assert out.eq(7).all()  # and none of them has written


@needs_kernels
def test_where_no_thread_can_be_started_one_is_enough(alone: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    expected = _results()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(threading.Thread, "start", refuses)
    assert all(map(torch.equal, _results(), expected))
    assert not alone._team._others


@needs_kernels
def test_a_forked_process_has_threads_of_its_own(alone: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    expected, first = _results(), alone._team._others
    assert len(first) == 2
    _results()
    assert alone._team._others is first
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert all(map(torch.equal, _results(), expected))
    assert alone._team._others is not first
