"""A step on another device than the CPU: every tensor is on it, in the right dtype and shape, and one thing is read."""

from __future__ import annotations

import pytest
import torch

import forked
from other_device import take_steps


@pytest.mark.parametrize(
    ("preset", "dtype", "one_call"),
    [
        ("exact", torch.float32, False),
        ("exact", torch.bfloat16, True),
        ("paper", torch.float32, False),
        ("fast", torch.bfloat16, True),
    ],
)
def test_a_step_stays_on_its_device(preset: str, dtype: torch.dtype, one_call: bool) -> None:
    done = forked.run(take_steps, preset, dtype, one_call)
    assert done.returncode == 0, done.stderr
