"""Whole steps of the presets that need no plan, over PEFT's: `python -m benchmarks.steps.fast`. Resumable.

`--avx2` and `--avxvnni` keep celora's kernels, oneDNN, MKL and torch to these instructions, as on a laptop that has no
more, and measure float32.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.steps.step import run
from celora.studies.cells import Cell

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tier = parser.add_mutually_exclusive_group()
    for name in ONEDNN:
        tier.add_argument(f"--{name}", dest="tier", action="store_const", const=name)
    chosen = parser.parse_args().tier
    if chosen:
        os.environ.update(keep_to(chosen))  # each cell is measured in a new process, which reads them
    run(ON_A_LAPTOP if chosen else CELLS, RESULTS, ARMS, REPEATS)


if __name__ == "__main__":
    main()
