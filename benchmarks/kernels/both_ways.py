"""8 bits in both directions, from one copy of a weight: times of forward and backward, relative to the exact products.

`python -m benchmarks.kernels.both_ways` prints and writes `both_ways.jsonl`. It times the exact products; the 8-bit
forward, with quantisation and with an input that another layer has quantised; the 8-bit backward from the same copy,
and from a copy of its own. Everything is included. They take turns, and times are medians. `--dtypes float32` is for
CPUs that emulate bfloat16.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks import rows
from celora.kernels import operations
from celora.machine.allocator import keep_freed_memory
from celora.machine.timing import interleaved

SHAPES = [(576, 576), (1536, 576), (576, 1536), (1024, 1024), (2048, 2048), (4096, 4096)]  # (out, in)
RESULTS = Path(__file__).with_name("both_ways.jsonl")


def measure(out: int, inp: int, tokens: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """One row: times in milliseconds, and the relative error of each direction."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(out, inp, generator=generator) / inp**0.5).to(dtype)
    x, g = (torch.randn(tokens, n, generator=generator).to(dtype) for n in (inp, out))
    both = operations.pack_both_ways(weight, weight.float().abs().amax(1) / 127)
    own = operations.pack_weight(weight, weight.float().abs().amax(0) / 127)
    quantised, nothing = both.quantise(x), {"position": None, "onto": None}
    contenders = {
        "forward": lambda: x @ weight.t(),
        "backward": lambda: g @ weight,
        "forward, 8 bits": lambda: both.multiply(both.quantise(x), None, torch.empty_like(g)),
        "forward, 8 bits, shared input": lambda: both.multiply(quantised, None, torch.empty_like(g)),
        "backward, 8 bits": lambda: both.rows(g, None, **nothing),
        "backward, 8 bits, own copy": lambda: own.rows(g, None, **nothing),
    }
    times = {name: found["time_ms"] for name, found in interleaved(contenders, repeats=repeats).items()}
    exact = {"forward": x.float() @ weight.float().t(), "backward": g.float() @ weight.float()}
    errors = {
        name: round(float((contenders[f"{name}, 8 bits"]().float() - product).norm() / product.norm()), 5)
        for name, product in exact.items()
    }
    shape = {"out": out, "in": inp, "tokens": tokens, "dtype": str(dtype).removeprefix("torch.")}
    return shape | {"time_ms": {name: round(time, 4) for name, time in times.items()}, "error": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    keep_freed_memory()
    found = []
    for dtype in options.dtypes:
        for out, inp in SHAPES:
            row = measure(out, inp, options.tokens, getattr(torch, dtype), options.repeats)
            print(row, flush=True)
            found.append(row | rows.conditions())
    rows.replace(RESULTS, found, ("out", "in", "dtype"))


if __name__ == "__main__":
    main()
