"""Whole training steps on this machine: every model and kind of data, and how the cost grows.

`python -m benchmarks.steps.step` measures cells that `step.jsonl` lacks for this machine, one by one, and can be
interrupted. `--sweep` does the same for tokens per step and hidden size, into `step-sweep.jsonl`. `celora bench` does
the measuring. With a CUDA device the same script measures that device, and also Liger and Unsloth.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from benchmarks import rows
from celora.machine.allocator import keep_freed_memory
from celora.studies.bench import measure, table
from celora.studies.cells import Cell
from celora.studies.step import ARMS
from celora.train.loading import quiet_libraries

COMPILED = [Cell("h1024-v32k", "full"), Cell("h1024-v32k", "instruct")]  # ten minutes of compiling, so they come last
HALF = [Cell("smollm2", "demo"), Cell("smollm2", "full")]
HALF += [Cell(shape, data) for shape in ("h1024-v128k", "h2048-v128k", "h2048-v32k") for data in ("full", "instruct")]
HALF += COMPILED
FULL = [Cell(cell.model, cell.data, "float32") for cell in HALF]
SWEEP = [Cell("h1024-v32k", "full", tokens=tokens) for tokens in (64, 256, 1024, 2048)]
SWEEP += [Cell(f"h{hidden}-v32k", "full") for hidden in (256, 512, 2048)]
SWEPT = ("PEFT", "exact", "paper", "auto", "plan", "limit")


def run(cells: Iterable[Cell], path: Path, arms: Sequence[str] | None, repeats: int) -> None:
    """Measure each cell in a process of its own, so that memory and compiled code of one do not affect the next."""
    here = rows.machine(rows.conditions())
    done = {tuple(row["cell"]) for row in rows.found(path) if rows.machine(row) == here}
    context = multiprocessing.get_context("spawn")
    for cell in cells:
        if tuple(asdict(cell).values()) in done:
            continue
        chosen = arms or [arm for arm in ARMS if not arm.endswith("+ compile") or cell in COMPILED]
        process = context.Process(target=run_cell, args=(cell, path, chosen, repeats))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"measuring {cell} ended with status {process.exitcode}")


def run_cell(cell: Cell, path: Path, arms: Sequence[str], repeats: int) -> None:
    keep_freed_memory()
    with quiet_libraries():
        found = measure(cell, arms, repeats=repeats, memory=arms != SWEPT, say=functools.partial(print, flush=True))
    Console(width=160).print(table(found), highlight=False)
    for row in found:
        rows.append(path, {"cell": tuple(asdict(cell).values())} | row | rows.conditions(row["arm"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=8)
    chosen = parser.parse_args()
    if chosen.sweep:
        run(SWEEP, Path(__file__).with_name("step-sweep.jsonl"), SWEPT, chosen.repeats)
    else:
        cells = HALF if chosen.dtype == "bfloat16" else FULL
        run(cells, Path(__file__).with_name("step.jsonl"), None, chosen.repeats)


if __name__ == "__main__":
    main()
