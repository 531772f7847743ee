"""Where Triton's kernels are tested: on the GPU if there is one, otherwise in the interpreter."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator

import numpy
import pytest
import torch
from packaging.version import Version

OLDEST = Version("3.7")  # of extra dev; the interpreter of older ones fails with NumPy 2.4
there = importlib.util.find_spec("triton") is not None and Version(importlib.metadata.version("triton")) >= OLDEST
needs_triton = pytest.mark.skipif(
    not there, reason=f"Triton {OLDEST} is not installed: extra dev has it for Linux on x86-64"
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [
    torch.float32,
    torch.float16,
    *([torch.bfloat16] if DEVICE.type == "cuda" else []),
]  # the interpreter has no bf16


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The interpreter computes with NumPy, which warns about numbers that are not finite. Silence that."""
    with numpy.errstate(all="ignore"):
        yield
