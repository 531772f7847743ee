"""Whole steps of the presets of celora, over PEFT's: `python -m benchmarks.steps.fast`. Resumable.

`--avx2` and `--avxvnni` keep celora's kernels, oneDNN, MKL and torch to these instructions, as on a laptop that has no
more, and measure float32.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from benchmarks import rows
from celora.machine.allocator import keep_freed_memory
from celora.studies.bench import measure, table
from celora.studies.cells import Cell
from celora.train.loading import quiet_libraries

RESULTS, ARMS, REPEATS = Path(__file__).with_name("fast.jsonl"), ("PEFT", "exact", "auto", "fast"), 5
SHAPES = (("smollm2", "full"), ("h1024-v32k", "full"), ("h2048-v32k", "full"))
SHAPES += (("smollm2", "demo"), ("h1024-v32k", "instruct"), ("h2048-v32k", "instruct"))
CELLS = [Cell(*shape, dtype) for shape in SHAPES for dtype in ("float32", "bfloat16")]
ON_A_LAPTOP = [Cell(*shape, "float32") for shape in SHAPES if shape[0] != "h2048-v32k"]
ONEDNN = {"avx2": "AVX2", "avxvnni": "AVX2_VNNI"}  # by tier; MKL and torch have no own code for AVX-VNNI


def keep_to(tier: str) -> dict[str, str]:
    """The variables that keep all four libraries to the instructions of a tier."""
    return {
        "CELORA_KERNELS": tier,
        "ONEDNN_MAX_CPU_ISA": ONEDNN[tier],
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    }


def run(cells: Iterable[Cell]) -> None:
    """Measure each cell in a process of its own, so that memory and compiled code of one do not affect the next."""
    here = rows.machine(rows.conditions())
    done = {tuple(row["cell"]) for row in rows.found(RESULTS) if rows.machine(row) == here}
    context = multiprocessing.get_context("spawn")
    for cell in cells:
        if tuple(asdict(cell).values()) in done:
            continue
        process = context.Process(target=run_cell, args=(cell,))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"measuring {cell} ended with status {process.exitcode}")


def run_cell(cell: Cell) -> None:
    keep_freed_memory()
    with quiet_libraries():
        found = measure(cell, ARMS, repeats=REPEATS, say=functools.partial(print, flush=True))
    Console(width=160).print(table(found), highlight=False)
    for row in found:
        rows.append(RESULTS, {"cell": tuple(asdict(cell).values())} | row | rows.conditions(row["arm"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tier = parser.add_mutually_exclusive_group()
    for name in ONEDNN:
        tier.add_argument(f"--{name}", dest="tier", action="store_const", const=name)
    chosen = parser.parse_args().tier
    if chosen:
        os.environ.update(keep_to(chosen))  # each cell is measured in a new process, which reads them
    run(ON_A_LAPTOP if chosen else CELLS)


if __name__ == "__main__":
    main()
