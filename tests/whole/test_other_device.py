"""A step on another device than the CPU: every tensor is on it, in the right dtype and shape, and one thing is read."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import forked
import other_device
from celora.machine.own_process import of_module
from other_device import NO_BACKWARD, Device, take_steps
from triton_here import needs_triton

COMPILER = shutil.which("cc")
# Most environments without a GPU have torch's build for the CPU. The nightly job `cuda` has the other.
needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None or torch.cuda.is_available() or COMPILER is None,
    reason="needs a build of torch for CUDA, no GPU, and a C compiler",
)


@pytest.mark.parametrize(
    ("preset", "dtype", "device"),
    [
        ("exact", torch.float32, Device(one_call=False)),
        ("exact", torch.bfloat16, Device()),
        ("paper", torch.float32, Device(one_call=False)),
        ("auto", torch.bfloat16, Device()),
        ("fast", torch.bfloat16, Device()),
        pytest.param("paper", torch.bfloat16, Device(kernels=True), marks=needs_triton),
        pytest.param("auto", torch.bfloat16, Device(kernels=True), marks=needs_triton),
        pytest.param("fast", torch.bfloat16, Device(kernels=True), marks=needs_triton),
    ],
)
def test_a_step_stays_on_its_device(preset: str, dtype: torch.dtype, device: Device) -> None:
    done = forked.run(take_steps, preset, dtype, device)
    assert done.returncode == 0, done.stderr


@needs_cuda_build
@pytest.mark.parametrize("preset", ["exact", "paper", "auto", "fast"])
@pytest.mark.parametrize("kernels", [False, True])
def test_a_step_of_fake_cuda_tensors(preset: str, kernels: bool, tmp_path: Path) -> None:
    library = tmp_path / "libcuda.so.1"
    source = Path(other_device.__file__).with_name("pretended_cuda.c")
    subprocess.run(
        [str(COMPILER), "-shared", "-fPIC", f"-Wl,-soname,{library.name}", source, "-o", library], check=True
    )
    command, place = of_module("other_device", preset, *(["kernels"] if kernels else []))
    place |= {"LD_PRELOAD": str(library)}
    done = subprocess.run(command, env=place, capture_output=True, text=True, check=False)
    if done.returncode == NO_BACKWARD:
        pytest.skip(f"this version of torch does not run backward without a GPU: {done.stdout.strip()}")
    assert done.returncode == 0, done.stderr
