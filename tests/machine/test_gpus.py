"""NVIDIA's GPUs: which one a name means, and that published peaks agree with each other."""

from __future__ import annotations

import pytest

from celora.errors import CELoraError
from celora.machine.gpus import GPUS, SIZES, gpu_named


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("rtx 4060", "RTX 4060"),
        ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 3050 6GB", "RTX 3050 6GB"),
    ],
)
def test_a_name_or_what_the_driver_calls_it(name: str, meant: str) -> None:
    assert gpu_named(name) == meant


@pytest.mark.parametrize("name", ["", "GTX 1080", "NVIDIA GeForce RTX 4060 Laptop GPU", "RTX", "A100", "RTX 4090D"])
def test_other_cards_are_not_guessed(name: str) -> None:
    with pytest.raises(CELoraError, match=r"nothing is known of a GPU .*; name one that is like it: RTX 3050 6GB, "):
        gpu_named(name)


def test_the_rates_of_a_card_are_multiples_of_each_other() -> None:
    for name, gpu in GPUS.items():
        assert gpu.int8 == pytest.approx(gpu.bfloat16 * (4 if name.startswith("RTX") else 2), rel=0.02)
        # On GeForce cards sums in float32 halve the rate of 8-bit floats.
        assert gpu.fp8 is None or gpu.fp8 == pytest.approx(gpu.int8 / (2 if name.startswith("RTX") else 1), rel=0.02)
        assert gpu.float32 < gpu.bfloat16
        assert gpu.memory in SIZES or name in ("RTX 3080",)
