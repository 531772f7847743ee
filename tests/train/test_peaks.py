"""NVIDIA's GPUs: which one a name means, and that published peaks agree with each other."""

from __future__ import annotations

import pytest

from celora.errors import CELoraError
from celora.train.forecast.peaks import GPUS, USABLE, gpu_named, usable


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("rtx 4060", "RTX 4060"),
        ("NVIDIA GeForce RTX 4060", "RTX 4060"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("RTX 4060 Ti 16 GB", "RTX 4060 Ti 16GB"),
        ("NVIDIA GeForce RTX 3050 6GB", "RTX 3050 6GB"),
    ],
)
def test_a_name_or_what_the_driver_calls_it(name: str, meant: str) -> None:
    assert gpu_named(name) == meant


def test_of_two_cards_with_one_name_the_memory_tells() -> None:
    assert [gpu_named("NVIDIA GeForce RTX 4060 Ti", size) for size in (8, 16)] == [
        "RTX 4060 Ti 8GB",
        "RTX 4060 Ti 16GB",
    ]
    with pytest.raises(CELoraError):
        gpu_named("NVIDIA GeForce RTX 4060 Ti")


@pytest.mark.parametrize(
    "name",
    [
        "", "GTX 1080", "NVIDIA GeForce RTX 4060 Laptop GPU", "RTX", "A100", "RTX 4090 D", "RTX 3060 Ti", "RTX 4070 Ti",
        "RTX 4070 Ti SUPER", "RTX 4080 SUPER", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "A100-SXM4-40GB MIG 1g.5gb",
        "Tesla T4",
    ],
)  # fmt: skip
def test_other_cards_are_not_guessed(name: str) -> None:
    with pytest.raises(CELoraError, match=r"nothing is known of a GPU .*, only of RTX 3050 6GB, .*a similar one"):
        gpu_named(name)


def test_what_a_program_gets_is_no_more_than_the_size() -> None:
    for gpu in GPUS.values():
        assert 0.9 * gpu.memory * 2**30 < usable(gpu.memory) <= gpu.memory * 2**30
    assert usable(24) == 22 * 2**30


def test_the_rates_of_a_card_are_multiples_of_each_other() -> None:
    for name, gpu in GPUS.items():
        assert gpu.int8 == pytest.approx(gpu.bfloat16 * (4 if name.startswith("RTX") else 2), rel=0.02)
        # On GeForce cards sums in float32 halve the rate of 8-bit floats.
        assert gpu.fp8 is None or gpu.fp8 == pytest.approx(gpu.int8 / (2 if name.startswith("RTX") else 1), rel=0.02)
        assert gpu.float32 < gpu.bfloat16
        assert gpu.memory in USABLE or name == "RTX 3080 10GB"
