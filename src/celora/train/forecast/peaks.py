"""What NVIDIA publishes about its GPUs: memory, bandwidth, rates. For forecasts; nothing here was measured.

Sources: NVIDIA's architecture white papers and data sheets (GA102, AD102, L4, L40S, A100, H100). Rates of cards that
they leave out follow from the card's tensor cores and its boost clock.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from celora.errors import CELoraError

# Sizes of common GPUs in GB, and the GiB that a program gets there. Error correction takes some of 24 and 48.
USABLE = {6: 6, 8: 8, 12: 12, 16: 16, 24: 22, 40: 39, 48: 44, 80: 79}


@dataclass(frozen=True)
class Gpu:
    """Published peaks of one GPU, dense. A multiply-add counts as two operations.

    Attributes:
        memory: GB, a key of `USABLE`; another number is as much.
        bandwidth: bytes a second, of its memory.
        float32, bfloat16, int8, fp8: operations a second. The sums of 16-bit and 8-bit floats are float32. fp8 is None
            where there is none.
    """

    memory: int
    bandwidth: float
    float32: float
    bfloat16: float
    int8: float
    fp8: float | None = None


GPUS = {
    "RTX 3050 6GB": Gpu(6, 168e9, 6.8e12, 13.5e12, 54e12),
    "RTX 3060 12GB": Gpu(12, 360e9, 12.7e12, 25.5e12, 102e12),
    "RTX 3070": Gpu(8, 448e9, 20.3e12, 40.6e12, 163e12),
    "RTX 3080 10GB": Gpu(10, 760e9, 29.8e12, 59.5e12, 238e12),
    "RTX 3090": Gpu(24, 936e9, 35.6e12, 71.0e12, 284e12),
    "RTX 4060": Gpu(8, 272e9, 15.1e12, 30.2e12, 121e12, 60.4e12),
    "RTX 4060 Ti 8GB": Gpu(8, 288e9, 22.1e12, 44.1e12, 177e12, 88.2e12),
    "RTX 4060 Ti 16GB": Gpu(16, 288e9, 22.1e12, 44.1e12, 177e12, 88.2e12),
    "RTX 4070": Gpu(12, 504e9, 29.1e12, 58.3e12, 233e12, 116.6e12),
    "RTX 4080": Gpu(16, 717e9, 48.7e12, 97.5e12, 390e12, 194.9e12),
    "RTX 4090": Gpu(24, 1008e9, 82.6e12, 165.2e12, 660.6e12, 330.3e12),
    "L4": Gpu(24, 300e9, 30.3e12, 121e12, 242.5e12, 242.5e12),
    "L40S": Gpu(48, 864e9, 91.6e12, 362e12, 733e12, 733e12),
    "A100 40GB": Gpu(40, 1555e9, 19.5e12, 312e12, 624e12),
    "A100 80GB": Gpu(80, 2039e9, 19.5e12, 312e12, 624e12),
    "A100 80GB PCIe": Gpu(80, 1935e9, 19.5e12, 312e12, 624e12),
    "H100": Gpu(80, 3350e9, 66.9e12, 989.4e12, 1978.9e12, 1978.9e12),
}


def gpu_named(name: str, size: int | None = None) -> str:
    """The key of `GPUS` for a name like `rtx 4060`, or for what the driver calls a card.

    Args:
        size: GB of its memory, where the driver tells it. Some names are those of two cards.

    Raises:
        CELoraError: none is meant. Laptops' cards have other rates.
    """
    plain = re.sub(
        r"NVIDIA|GEFORCE|\bGPU\b|\bSXM\d?\b|\bPCIE(?= 40GB)|\bHBM\d?\w?\b", " ", name.upper().replace("-", " ")
    )
    plain = " ".join(re.sub(r"(\d+)\s*GB", r"\1GB", plain).split())
    for said in (plain, f"{plain} {size}GB", plain.removesuffix(" 80GB")):
        for key in GPUS:
            if said == key.upper():
                return key
    raise CELoraError(
        f"nothing is known of a GPU {name!r}, only of {', '.join(GPUS)}; give celora estimate --gpu a similar one"
    )


def usable(size: int) -> int:
    """Bytes that a program gets of a GPU of so many GB."""
    return USABLE.get(size, size) * 2**30
