from __future__ import annotations

import pytest
import torch

from celora.machine import threads
from patching import patch_all


def test_threads_are_lowered_and_never_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for allowed, expected in ((None, 3), (8, 3), (2, 2)):
            patch_all(monkeypatch, "celora.machine.threads:allowed_cpus", lambda allowed=allowed: allowed)
            assert threads.use_allowed_threads() == expected
        torch.set_num_threads(3)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert threads.use_allowed_threads() == 3
    finally:
        torch.set_num_threads(before)
