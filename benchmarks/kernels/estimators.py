"""Times estimates of `grad_output @ W` in turns with the dense product, with everything included.

`python -m benchmarks.kernels.estimators [--quick]` prints a table and writes `estimators.jsonl`. Refreshes are measured
separately, because they happen once in `refresh_every` steps. "masked" is a gradient with 70 % of its tokens zero, like
prompts without labels.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import rows
from celora.machine.allocator import keep_freed_memory
from celora.machine.timing import interleaved
from celora.numerics.estimators import Columns, Estimator, Int8, Tokens

SHAPES = [(192, 576), (576, 576), (1536, 576), (576, 1536), (1024, 1024), (2816, 1024), (2048, 2048), (4096, 4096)]
SETTINGS: dict[str, tuple[type[Estimator], dict[str, Any]]] = {
    "columns 0.25": (Columns, {"keep_ratio": 0.25, "rank": 14}),
    "columns 0.5": (Columns, {"keep_ratio": 0.5, "rank": 14}),
    "columns 0.65": (Columns, {"keep_ratio": 0.65, "rank": 14}),
    "tokens 0.5": (Tokens, {"keep_ratio": 0.5}),
    "tokens 0.6": (Tokens, {"keep_ratio": 0.6}),
    "int8": (Int8, {}),
    "int8, no copy": (Int8, {"weight_copy": False}),
    "int8 x tokens 0.6": (Tokens, {"keep_ratio": 0.6, "precision": "int8"}),
    "int8 x tokens, masked": (Tokens, {"selection": "energy", "precision": "int8"}),
    "int8 x columns 0.5": (Columns, {"keep_ratio": 0.5, "precision": "int8"}),
}
REFRESHED = ("columns 0.5", "int8 x tokens 0.6")


def measure(out: int, inp: int, tokens: int, dtype: torch.dtype, repeats: int) -> list[dict[str, object]]:
    """Rows of one shape: the dense product first, then every setting, and refreshes."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(out, inp, generator=generator) / inp**0.5).to(dtype)
    gradient = torch.randn(tokens, out, generator=generator).to(dtype)
    masked = gradient.clone()
    masked[torch.randperm(tokens, generator=generator)[: tokens * 7 // 10]] = 0
    exact = gradient @ weight
    estimators = {name: kind(out, inp, **settings) for name, (kind, settings) in SETTINGS.items()}
    contenders = {"dense": lambda: gradient @ weight}
    for name, estimator in estimators.items():
        estimator.observe(gradient, weight, exact)
        estimator.select()
        contenders[name] = functools.partial(estimator.estimate, masked if "masked" in name else gradient, weight)

    def refresh(estimator: Estimator) -> None:
        estimator.observe(gradient, weight, exact)
        estimator.select()
        estimator.estimate(gradient, weight)

    for name in REFRESHED:
        contenders[f"{name}: refresh"] = functools.partial(refresh, estimators[name])
    times = interleaved(contenders, repeats=repeats)
    dense = times["dense"]["time_ms"]
    return [
        {
            "estimator": name,
            "out": out,
            "in": inp,
            "tokens": tokens,
            "dtype": str(dtype).removeprefix("torch."),
            **timed,
            "ratio": round(timed["time_ms"] / dense, 4),
            "flops": 1.0 if name not in estimators else round(estimators[name].cost, 4),
        }
        for name, timed in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--quick", action="store_true", help="two shapes, few repeats, nothing written")
    options = parser.parse_args()
    keep_freed_memory()  # celora train does so; else large shapes would measure the operating system's pages
    dtype = getattr(torch, options.dtype)
    found = [
        row | rows.conditions()
        for out, inp in (SHAPES[2:4] if options.quick else SHAPES)
        for row in measure(out, inp, options.tokens, dtype, 11 if options.quick else 31)
    ]
    table = Table(title=f"time over the dense product, T={options.tokens}, {options.dtype}")
    for column in ("out x in", "estimator", "FLOPs", "time", "20-80 %, ms"):
        table.add_column(column)
    for row in found:
        spread = f"{row['p20_ms']:.2f} - {row['p80_ms']:.2f}"
        table.add_row(
            f"{row['out']} x {row['in']}", row["estimator"], f"{row['flops']:.2f}", f"{row['ratio']:.2f}", spread
        )
    Console().print(table)
    if not options.quick:
        rows.replace(Path(__file__).with_name("estimators.jsonl"), found, ["dtype"])


if __name__ == "__main__":
    main()
