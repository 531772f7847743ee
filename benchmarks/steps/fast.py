"""Whole steps of the presets that need no plan, over PEFT's: `python -m benchmarks.steps.fast`. Resumable.

`--avx2` keeps celora's kernels, oneDNN, MKL and torch to AVX2, as on a laptop that has no more, and measures float32.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks.steps.step import run
from celora.studies.cells import Cell

RESULTS, ARMS, REPEATS = Path(__file__).with_name("fast.jsonl"), ("PEFT", "exact", "auto", "fast"), 5
SHAPES = (("smollm2", "full"), ("h1024-v32k", "full"), ("h2048-v32k", "full"))
SHAPES += (("smollm2", "demo"), ("h1024-v32k", "instruct"), ("h2048-v32k", "instruct"))
CELLS = [Cell(*shape, dtype) for shape in SHAPES for dtype in ("float32", "bfloat16")]
WITH_AVX2 = [Cell(*shape, "float32") for shape in SHAPES if shape[0] != "h2048-v32k"]
AVX2 = {
    "CELORA_KERNELS": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
}

if __name__ == "__main__":
    if sys.argv[1:] == ["--avx2"]:
        os.environ.update(AVX2)  # each cell is measured in a new process, which reads them
        run(WITH_AVX2, RESULTS.with_name("fast-avx2.jsonl"), ARMS, REPEATS)
    else:
        run(CELLS, RESULTS, ARMS, REPEATS)
