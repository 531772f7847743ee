"""Everything that is to be measured on an NVIDIA GPU, in one command: `python benchmarks/gpu.py [--minutes 7.5]`.

1. Every Triton kernel against torch, in every dtype, and the attention of packed sequences in one call against a call
   each. If one is wrong, the program ends with status 1 (with `--arms` it goes on; celora uses no wrong kernel).
2. Each kernel in turns with torch's operators, and the 8-bit products with as many products in bfloat16, for `up_proj`
   and the head of Llama 1B, 3B and 8B.
3. Whole training steps at these shapes, random weights: TRL + PEFT, Liger and Unsloth where they are installed, celora
   `exact`, `fast` with and without a base in int8. Times, peak memory, share of the limit, and
   how often a step waits for the GPU.

Rows go to `kernels/gpu.jsonl` and `steps/gpu.jsonl`, each as soon as it is measured. They replace older rows of the
same GPU; rows of steps replace only those of the same commit, so that each commit keeps its baseline. Then the tables
of `docs/measured/gpu.md` are written. After `--minutes`, no kernel and no arm is begun, and Liger and Unsloth
are ended. Each list of what is left out says how to measure it later. Correctness takes the time that it needs.
Without `.git`, `CELORA_COMMIT` says which commit this is.
It was written without a GPU: nothing here has been run on one.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

if not __package__:  # started as a file: the path has its folder, whose names are no modules, and not the one above
    HERE = Path(__file__).resolve().parent
    sys.path[:] = [str(HERE.parent), *(folder for folder in sys.path if Path(folder).resolve() != HERE)]

import torch

from benchmarks import rows
from benchmarks.kernels import gpu as kernels
from benchmarks.steps import gpu as steps
from celora.kernels.triton.judge import judge


def main(given: list[str] | None = None) -> None:
    deadline = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.5, help="measure nothing later")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=list(steps.ARMS),
        help="only steps: of these arms and of those that tables compare with",
    )
    chosen = parser.parse_args(given)
    deadline += 60 * chosen.minutes
    device = torch.device("cuda", 0)
    right = kernels.check(device)
    if not right and chosen.arms is None:
        raise SystemExit(1)
    judge(device)  # from here on, what is right and faster is used
    if chosen.arms is None:
        for row in kernels.time_kernels(device, deadline=deadline):
            rows.replace(kernels.ROWS, [row], ("operation", "model"))
            print(f"{row['model']} {row['operation']}:", row.get("times") or row["not_run"], flush=True)
    steps.measure(steps.ARMS if chosen.arms is None else [*steps.COMPARED, *chosen.arms], deadline)
    write_tables()


def write_tables() -> None:
    """Write the pages, for whose other tables celora's application is needed; without it, say so."""
    try:
        from benchmarks import tables
    except ModuleNotFoundError as missing:
        print(f"{missing}: the tables are written by `python -m benchmarks.tables`, where it is installed.")
    else:
        tables.main()


if __name__ == "__main__":
    main()
