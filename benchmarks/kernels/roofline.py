"""What each Triton kernel would take at best: bytes and operations over the published peaks of a GPU. Nothing is run.

    time >= max(bytes / bandwidth, operations / rate),    intensity = operations / bytes.

Bytes are those that have to come from and go to the GPU's memory once: the operands, the results, scales. The softmax
reads its logits twice. Operations of passes are few, so their bandwidth decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from celora.studies.cells import LLAMAS, Llama
from celora.train.forecast import peaks

TOKENS = 4096
GPUS = {name: peaks.GPUS[name] for name in ("RTX 3060 12GB", "RTX 4090", "A100 80GB", "H100")}


MODELS = {name.removeprefix("llama-").upper(): shape for name, shape in LLAMAS.items()}


@dataclass(frozen=True)
class Work:
    """What a kernel does: bytes moved, operations, and whose rate it is computed at."""

    bytes: int
    operations: int
    rate: str

    def time_us(self, gpu: peaks.Gpu) -> float | None:
        """The roofline's time; None where the GPU has no such instructions."""
        rate = getattr(gpu, self.rate)
        return None if rate is None else 1e6 * max(self.bytes / gpu.bandwidth, self.operations / rate)


def kernels(model: Llama, tokens: int = TOKENS) -> Iterator[tuple[str, Work]]:
    """The work of every kernel for `up_proj`, (intermediate, hidden), its gradient, and the head, in bfloat16."""
    wide, deep = model.intermediate, model.hidden
    numbers, product = tokens * wide, 2 * tokens * wide * deep
    yield "quantise_rows", Work(3 * numbers + 4 * tokens, 4 * numbers, "bfloat16")
    yield "squared_row_norms", Work(2 * numbers + 4 * tokens, 2 * numbers, "bfloat16")
    yield "squared_column_norms", Work(2 * numbers + 4 * wide, 2 * numbers, "bfloat16")
    yield "column_maxima", Work(2 * numbers + 4 * wide, numbers, "bfloat16")
    yield "softmax_rows, with its gradient", Work(6 * tokens * model.words, 10 * tokens * model.words, "bfloat16")
    scales = 4 * (tokens + deep)
    eight = tokens * wide + wide * deep + 2 * tokens * deep + scales
    yield "product, bf16 (for comparison)", Work(2 * (tokens * wide + wide * deep + tokens * deep), product, "bfloat16")
    yield "product, int8", Work(eight, product, "int8")
    yield "product, fp8", Work(eight, product, "fp8")
