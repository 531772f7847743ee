"""Causal attention of short sequences on CPU: torch's flash attention, with its own backward and with a float32 one.

For each length, forward and backward of 1,024 packed tokens, 16 heads of 64, taking turns. Writes
`results/attention.jsonl`; `celora.attention` takes the float32 backward up to the length where it stops paying.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from torch import Tensor, nn

import rows
from celora import attention
from celora.timing import interleaved
from celora.train.allocator import keep_freed_memory

TOKENS, HEADS, SIZE = 1024, 16, 64


def run(length: int, dtype: torch.dtype) -> dict[str, object]:
    lengths = (length,) * (TOKENS // length)
    shape = (1, HEADS, length * len(lengths), SIZE)
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]
    grad = torch.randn(1, shape[2], HEADS, SIZE).to(dtype)

    def step(short: int) -> Tensor:
        attention._SHORT = short
        output, _ = attention.attention(nn.Identity(), *inputs, None, celora_lengths=lengths)
        output.backward(grad)
        return output

    times = interleaved({"own": lambda: step(0), "float32": lambda: step(length)}, repeats=15)
    ratio = times["float32"]["time_ms"] / times["own"]["time_ms"]
    return {
        "length": length,
        "dtype": str(dtype).removeprefix("torch."),
        "own_ms": times["own"]["time_ms"],
        "float32_ms": times["float32"]["time_ms"],
        "ratio": round(ratio, 3),
    } | rows.conditions()


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    keep_freed_memory()
    found = [run(length, torch.bfloat16) for length in (16, 32, 64, 96, 128, 160, 192, 256, 512)]
    for row in found:
        Console().print({key: row[key] for key in ("length", "own_ms", "float32_ms", "ratio")})
    rows.write(rows.RESULTS / "attention.jsonl", found)


if __name__ == "__main__":
    main()
