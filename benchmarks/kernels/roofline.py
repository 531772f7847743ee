"""What each Triton kernel would take at best: bytes and operations over the published peaks of a GPU. Nothing is run.

    time >= max(bytes / bandwidth, operations / rate),    intensity = operations / bytes.

Bytes are those that have to come from and go to the GPU's memory once: the operands, the results, scales. The softmax
reads its logits twice. Operations of passes are few, so their bandwidth decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

TOKENS = 4096


@dataclass(frozen=True)
class Gpu:
    """Published peaks, dense: bytes a second, and operations a second (a multiply-add counts as two).

    Attributes:
        bandwidth: of its memory. bf16: with float32 sums; int8; fp8: with float32 sums, None where there is none.
    """

    bandwidth: float
    bf16: float
    int8: float
    fp8: float | None


# NVIDIA's architecture white papers and data sheets (GA102, AD102, A100 80 GB SXM, H100 SXM). The 3060's rates are its
# 112 tensor cores' at 1.78 GHz.
GPUS = {
    "RTX 3060": Gpu(360e9, 25.5e12, 102e12, None),
    "RTX 4090": Gpu(1008e9, 165.2e12, 660.6e12, 330.3e12),
    "A100": Gpu(2039e9, 312e12, 624e12, None),
    "H100": Gpu(3350e9, 989.4e12, 1978.9e12, 1978.9e12),
}


@dataclass(frozen=True)
class Llama:
    hidden: int
    intermediate: int
    words: int = 128_256


MODELS = {"1B": Llama(2048, 8192), "3B": Llama(3072, 8192), "8B": Llama(4096, 14_336)}


@dataclass(frozen=True)
class Work:
    """What a kernel does: bytes moved, operations, and whose rate it is computed at."""

    bytes: int
    operations: int
    rate: str

    def time_us(self, gpu: Gpu) -> float | None:
        """The roofline's time; None where the GPU has no such instructions."""
        rate = getattr(gpu, self.rate)
        return None if rate is None else 1e6 * max(self.bytes / gpu.bandwidth, self.operations / rate)


def kernels(model: Llama, tokens: int = TOKENS) -> Iterator[tuple[str, Work]]:
    """The work of every kernel for `up_proj`, (intermediate, hidden), its gradient, and the head, in bfloat16."""
    wide, deep = model.intermediate, model.hidden
    numbers, product = tokens * wide, 2 * tokens * wide * deep
    yield "quantise_rows", Work(3 * numbers + 4 * tokens, 4 * numbers, "bf16")
    yield "squared_row_norms", Work(2 * numbers + 4 * tokens, 2 * numbers, "bf16")
    yield "squared_column_norms", Work(2 * numbers + 4 * wide, 2 * numbers, "bf16")
    yield "column_maxima", Work(2 * numbers + 4 * wide, numbers, "bf16")
    yield "softmax_rows, with its gradient", Work(6 * tokens * model.words, 10 * tokens * model.words, "bf16")
    scales = 4 * (tokens + deep)
    eight = tokens * wide + wide * deep + 2 * tokens * deep + scales
    yield "product, bf16 (for comparison)", Work(2 * (tokens * wide + wide * deep + tokens * deep), product, "bf16")
    yield "product, int8", Work(eight, product, "int8")
    yield "product, fp8", Work(eight, product, "fp8")
