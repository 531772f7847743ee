"""The time from the start of the command to the saved adapter: `python -m benchmarks.steps.adapter`. Interruptible.

It runs `celora train` as a process of its own, on the demo's model and rows, with preset `off` (PEFT), `exact` and
`auto`, for 1, 20 and 100 steps, or as many as `--steps` says. Presets take turns; every other turn has them in reverse.
A row has the seconds to the adapter, the seconds of the whole command, and its parts by the command's own clock. In the
first turn of `auto` the user's cache of measurements is empty (`first`). Writes `adapter.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks import rows
from celora.files import write_text
from celora.machine.cache import cache_folder
from celora.machine.timing import faster_dtype
from celora.studies.assets import demo_model
from celora.studies.demo import shared_settings
from celora.studies.sentiment import splits, to_rows
from celora.train.wall_clock import spent

RESULTS = Path(__file__).with_name("adapter.jsonl")
PRESETS, STEPS, TURNS, BATCH = ("off", "exact", "auto"), (1, 20, 100), 5, 8


def train(folder: Path, preset: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One command: seconds to the adapter, of the whole, and of each part."""
    output, config = folder / "out", folder / "run.yaml"
    write_text(config, yaml.safe_dump(settings))
    command = [sys.executable, "-m", "celora", "train", "--config", str(config), "--preset", preset]
    command += ["--output", str(output), "--overwrite", "--json", "--quiet"]
    begun, clock = time.time(), time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    whole, summary = time.perf_counter() - clock, json.loads(done.stdout)
    adapter = os.stat(output / "adapter_model.safetensors").st_mtime - begun
    parts = {f"{part}_s": seconds for part, seconds in spent(summary).items()}
    return {"adapter_s": round(adapter, 2), "command_s": round(whole, 2), **parts, "loss": summary["loss"]}


def forget_measurements() -> None:
    """Empty the user's cache of measurements, as before the first run on a machine."""
    for file in cache_folder("measured").iterdir():
        file.unlink()


def measure(presets: Sequence[str], steps: Sequence[int], turns: int, results: Path) -> None:
    """Append a row of each turn, preset and number of steps to `results`."""
    model, dtype = demo_model(), faster_dtype()
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows.jsonl"
        for count in steps:
            rows_ = to_rows(splits(seed=0).train[: count * BATCH])  # 1,000 steps begin a second epoch
            write_text(data, "".join(json.dumps(row) + "\n" for row in rows_))
            settings = shared_settings(model, count, BATCH, dtype) | {"data": str(data), "logging_steps": 1}
            for turn in range(turns):
                for preset in presets if turn % 2 == 0 else reversed(presets):
                    first = preset == "auto" and turn == 0
                    if first:
                        forget_measurements()
                    found = train(Path(scratch), preset, settings)
                    row = {"preset": preset, "steps": count, "turn": turn, "first": first, "dtype": dtype} | found
                    print(row, flush=True)
                    rows.append(results, row | rows.conditions(preset))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    measure(chosen.presets, chosen.steps, chosen.turns, chosen.results)


if __name__ == "__main__":
    main()
