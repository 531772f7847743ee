from __future__ import annotations

import subprocess
import sys

import pytest

from celora.machine import allocator


def test_elsewhere_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert allocator.keep_freed_memory() is False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_not_faulted_in_again() -> None:
    """In a new process, a large block is freed and allocated again. The second time costs no page faults."""
    script = """
import resource, sys
from celora.machine.allocator import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(64 << 20)
    del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
if not keep_freed_memory():
    sys.exit(77)  # another C library
faults()
sys.exit(0 if faults() < 100 else 1)
"""
    status = subprocess.run([sys.executable, "-c", script], check=False).returncode
    if status == 77:
        pytest.skip("the C library has no mallopt")
    assert status == 0
