"""Steps in bfloat16 and in float32 on a CPU that does not multiply bfloat16: `python -m benchmarks.steps.dtypes`.

All arms of a cell take turns. PEFT is measured in float32 alone: in bfloat16 its steps take half a minute and more.
Resumable.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks import rows
from celora.machine.allocator import keep_freed_memory
from celora.machine.cpu import multiplies
from celora.machine.timing import percentiles
from celora.studies.cells import Cell, make_batches
from celora.studies.step import Step, make_step, take_turns
from celora.train.loading import quiet_libraries

RESULTS, REPEATS, DTYPES = Path(__file__).with_name("dtypes.jsonl"), 5, ("float32", "bfloat16")
CELLS = [Cell("smollm2", "demo", "float32"), Cell("smollm2", "full", "float32")]
ARMS = [("PEFT", "float32"), *((arm, dtype) for arm in ("exact", "auto", "fast") for dtype in DTYPES)]


def measure(cell: Cell) -> None:
    """Append the rows of this cell."""
    keep_freed_memory()
    batches = make_batches(cell)
    steps: dict[str, Step] = {}
    with quiet_libraries(), tempfile.TemporaryDirectory() as scratch:
        for arm, dtype in ARMS:
            own = replace(cell, dtype=dtype)
            steps[f"{arm} {dtype}"] = step = make_step(own, arm, Path(scratch), {})
            step.settle(batches)
        times = take_turns(steps, batches, REPEATS)
    found = {name: percentiles([sum(parts) for parts in taken]) for name, taken in times.items()}
    plain = found["PEFT float32"]["time_ms"]
    for arm, dtype in ARMS:
        time = found[f"{arm} {dtype}"]
        row = asdict(replace(cell, dtype=dtype)) | {"arm": arm} | time | {"speed_up": round(plain / time["time_ms"], 3)}
        rows.append(RESULTS, row | rows.conditions(arm))
        print(f"{cell.model}, {cell.data}: {arm} in {dtype} {row['time_ms']:.0f} ms, {row['speed_up']:.2f}", flush=True)


def main() -> None:
    if multiplies(torch.bfloat16):
        raise SystemExit("This CPU multiplies bfloat16, so the question does not arise.")
    here = rows.machine(rows.conditions())
    done = {(row["model"], row["data"]) for row in rows.found(RESULTS) if rows.machine(row) == here}
    for cell in CELLS:
        if (cell.model, cell.data) not in done:
            process = multiprocessing.get_context("spawn").Process(target=measure, args=(cell,))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"measuring {cell} ended with status {process.exitcode}")


if __name__ == "__main__":
    main()
