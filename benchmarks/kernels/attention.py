"""Causal attention on CPU: torch's flash attention, and our kernel.

For each dtype and length, it times forward and backward of 1,024 packed tokens, or of one sequence, 16 heads of 64, in
turns. Writes `attention.jsonl`. By these rows, `celora.modeling.attention` uses the kernel where it is available.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks import rows
from celora.kernels import operations as kernels
from celora.machine.allocator import keep_freed_memory
from celora.machine.timing import interleaved
from celora.modeling import attention

TOKENS, HEADS, SIZE = 1024, 16, 64
TILES_PAY = attention._tiles_pay


def run(length: int, dtype: torch.dtype) -> dict[str, object]:
    lengths = (length,) * max(1, TOKENS // length)
    shape = (1, HEADS, sum(lengths), SIZE)
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]
    grad = torch.randn(1, shape[2], HEADS, SIZE).to(dtype)

    def step(tiles: bool) -> Tensor:
        attention._tiles_pay = TILES_PAY if tiles else lambda *_: False
        output, _ = attention.attention(nn.Identity(), *inputs, None, celora_lengths=lengths)
        output.backward(grad)
        return output

    contenders = {"own": lambda: step(tiles=False)}
    if kernels.available("attention", torch.device("cpu")):
        contenders["tiles"] = lambda: step(tiles=True)
    times = interleaved(contenders, repeats=15)
    return (
        {"length": length, "dtype": str(dtype).removeprefix("torch.")}
        | {f"{name}_ms": timed["time_ms"] for name, timed in times.items()}
        | {f"{name}_ratio": round(timed["time_ms"] / times["own"]["time_ms"], 3) for name, timed in times.items()}
        | rows.conditions()
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    keep_freed_memory()
    lengths = (16, 32, 64, 96, 128, 160, 192, 256, 512, 1024, 2048)
    found = [run(length, dtype) for dtype in (torch.float32, torch.bfloat16) for length in lengths]
    for row in found:
        Console().print(
            {key: value for key, value in row.items() if key in ("length", "dtype") or key.endswith(("_ms", "_ratio"))}
        )
    rows.write(Path(__file__).with_name("attention.jsonl"), found)


if __name__ == "__main__":
    main()
