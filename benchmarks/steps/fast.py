"""Whole steps of the presets that need no plan, over PEFT's: `python -m benchmarks.steps.fast`. Resumable."""

from __future__ import annotations

from pathlib import Path

from benchmarks.steps.step import run
from celora.studies.cells import Cell

RESULTS, ARMS, REPEATS = Path(__file__).with_name("fast.jsonl"), ("PEFT", "exact", "auto", "fast"), 5
SHAPES = (("smollm2", "full"), ("h1024-v32k", "full"), ("h2048-v32k", "full"))
SHAPES += (("smollm2", "demo"), ("h1024-v32k", "instruct"), ("h2048-v32k", "instruct"))
CELLS = [Cell(*shape, dtype) for shape in SHAPES for dtype in ("float32", "bfloat16")]

if __name__ == "__main__":
    run(CELLS, RESULTS, ARMS, REPEATS)
