"""What an estimate of `grad_output @ W` takes, against the dense product: everything included, interleaved.

`python benchmarks/estimators.py [--quick]` prints a table and writes `results/estimators.jsonl`. Refreshing is
measured apart, since it happens once in `refresh_every` steps.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table

import rows
from celora.estimators import Columns, Tokens
from celora.timing import interleaved

SHAPES = [(192, 576), (576, 576), (1536, 576), (576, 1536), (1024, 1024), (2816, 1024), (2048, 2048), (4096, 4096)]
SETTINGS = {
    "columns 0.25": (Columns, 0.25, 14),
    "columns 0.5": (Columns, 0.5, 14),
    "columns 0.65": (Columns, 0.65, 14),
    "tokens 0.25": (Tokens, 0.25, 0),
    "tokens 0.5": (Tokens, 0.5, 0),
}


def measure(out: int, inp: int, tokens: int, dtype: torch.dtype, repeats: int) -> list[dict[str, object]]:
    """Rows of one shape: the dense product first, then every setting, and a refresh."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(out, inp, generator=generator) / inp**0.5).to(dtype)
    gradient = torch.randn(tokens, out, generator=generator).to(dtype)
    estimators = {n: kind(out, inp, keep_ratio=keep, rank=rank) for n, (kind, keep, rank) in SETTINGS.items()}
    contenders = {"dense": lambda: gradient @ weight}
    for name, estimator in estimators.items():
        estimator.observe(gradient, weight, gradient @ weight)
        estimator.select()
        contenders[name] = lambda e=estimator: e.estimate(gradient, weight)
    one = next(iter(estimators.values()))

    def refresh() -> None:
        one.observe(gradient, weight, gradient @ weight)
        one.select()

    contenders["columns: refresh"] = refresh
    times = interleaved(contenders, repeats=repeats)
    dense = times["dense"]["time_ms"]
    return [
        {
            "estimator": name,
            "out": out,
            "in": inp,
            "tokens": tokens,
            "dtype": str(dtype).removeprefix("torch."),
            **of,
            "ratio": round(of["time_ms"] / dense, 4),
            "flops": 1.0 if name not in estimators else round(estimators[name].cost, 4),
        }
        for name, of in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--quick", action="store_true", help="two shapes, few repeats, nothing written")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    found = [
        row | rows.conditions()
        for out, inp in (SHAPES[2:4] if options.quick else SHAPES)
        for row in measure(out, inp, options.tokens, dtype, 11 if options.quick else 41)
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
        rows.write(rows.RESULTS / f"estimators-{options.dtype}.jsonl", found)


if __name__ == "__main__":
    main()
