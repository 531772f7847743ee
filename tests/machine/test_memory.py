from __future__ import annotations

import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from celora.machine import cgroup, memory
from celora.machine.memory import available_memory, forget_peak, peak_memory, saved_for_backward

CPU = torch.device("cpu")


def test_what_is_saved_for_backward_counts_once_and_without_parameters() -> None:
    linear = nn.Linear(8, 8, bias=False)
    x = torch.randn(16, 8, requires_grad=True)
    with saved_for_backward(linear) as saved:
        y = linear(x)
        assert saved.nbytes == x.numel() * 4  # x is kept for the weight's gradient; the weight exists anyway
        z = linear(x) * linear(x)
    assert saved.nbytes == 3 * x.numel() * 4  # x once, and the two factors
    (y + z).sum().backward()


def test_what_was_saved_is_free_when_its_forward_is() -> None:
    """Without a backward, too. Sigmoid keeps its own result, which must not keep its node in turn."""
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    with saved_for_backward(layer) as saved:
        result = layer(x).sigmoid()
    assert saved.nbytes == x.nbytes + result.nbytes
    references = [weakref.ref(x), weakref.ref(result)]
    del x, result
    assert [reference() for reference in references] == [None, None]


def test_what_a_forward_lets_go_counts_at_the_fullest_moment_only() -> None:
    """A metric's graph, for example, is dropped early, and its memory may be taken again."""
    x = torch.randn(16, 8, requires_grad=True)
    with saved_for_backward(nn.Linear(8, 8)) as saved:
        for _ in range(3):
            x[:8].exp()  # keeps its result
        assert saved.nbytes == x.nbytes / 2
        kept = [x[:2].exp() for _ in range(3)]
        assert saved.nbytes == x.nbytes / 2
        kept.append(x[:8].exp())
    assert saved.nbytes == x.nbytes * 7 / 8


def test_peak_and_free_memory_are_plausible() -> None:
    before = peak_memory(CPU)
    kept = torch.ones(64 * 2**20)
    after, free = peak_memory(CPU), available_memory(CPU)
    assert before is not None
    assert after is not None
    assert free is not None
    assert after >= before >= 2**26
    assert after >= kept.numel() * 4
    assert 0 < free < 2**50


def test_files_of_the_system_that_say_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandbox without VmHWM, a program whose name is not ASCII, and a container with a limit."""
    files = {"/proc/self/status": "Name:\tentra\udceene\nVmHWM:\t  2048 kB\n"}

    def read(path: Path, encoding: str, errors: str = "strict") -> str:
        if str(path) not in files:
            raise FileNotFoundError(str(path))
        return files[str(path)].encode("utf-8", "surrogateescape").decode(encoding, errors)

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=4096 * 1024))
    assert peak_memory(CPU) == 2048 * 1024
    for allowed, expected in ((None, 4096 * 1024), (600000, 600000), (2**40, 4096 * 1024)):
        monkeypatch.setattr(cgroup, "free_memory", lambda allowed=allowed: allowed)
        assert available_memory(CPU) == expected
    files["/proc/self/status"] = "Name:\tpython\n"
    assert peak_memory(CPU) is not None  # the number comes from getrusage


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems keep the peak of a process for good")
def test_a_forgotten_peak_begins_anew() -> None:
    held = torch.ones(2**28)
    before = peak_memory(CPU)
    size = held.nbytes
    del held
    forget_peak(CPU)
    assert peak_memory(CPU) <= before - size // 2
