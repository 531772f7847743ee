"""What `celora estimate` says, beside what an epoch then takes: peak memory and time of each way.

`python -m benchmarks.scale.estimate` takes the demo's model; `--hidden 1024 --blocks 8` a Llama of random weights with
the demo's tokenizer. Each way is a process of its own: `celora train` over one epoch of the rated sentences. The
estimate and all ways take turns, and a row has means over turns, because a machine is not equally fast at all times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks import rows
from benchmarks.scale.memory import make_checkpoint
from celora.studies.assets import demo_model
from celora.studies.sentiment import splits, to_rows

RESULTS = Path(__file__).with_name("estimate.jsonl")
FIELDS = ("model", "base", "dtype", "preset", "checkpointing", "batch", "accumulation", "rows")
_WARM = 2  # steps that are not like the others
_MIB = 2**20
# Linux counts the peak of a program from what the process that starts it has. So a small process starts it.
_PEAK = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def make_inputs(given: argparse.Namespace, folder: Path) -> tuple[str, str]:
    """The model's folder and the file of rows."""
    data = folder / "rows.jsonl"
    sentences = splits(0, train=given.rows).train
    data.write_text("".join(json.dumps(row) + "\n" for row in to_rows(sentences)), encoding="utf-8")
    if given.hidden is None:
        return str(demo_model()), str(data)
    model = folder / "model"
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    shape = argparse.Namespace(hidden=given.hidden, blocks=given.blocks, vocabulary=len(tokenizer), dtype=given.stored)
    make_checkpoint(str(model), shape)
    tokenizer.save_pretrained(model)
    return str(model), str(data)


def estimated(model: str, data: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """What `celora estimate` says of each way with this batch, undivided."""
    command = ["estimate", "--model", model, "--data", data, "--json", *_batch(given)]
    command += [] if given.preset is None else ["--preset", given.preset]
    ways: list[dict[str, Any]] = json.loads(run_alone(command)[0])["ways"]
    return [way for way in ways if way["batch"] == given.batch]


def measured(way: dict[str, Any], model: str, data: str, output: Path) -> dict[str, Any]:
    """One epoch of it: the peak of the process, and the seconds of its steps."""
    command = ["train", "--model", model, "--data", data, "--output", str(output), "--quiet", "--num_train_epochs", "1"]
    command += ["--dtype", way["dtype"], "--preset", way["preset"], "--save_strategy", "no", "--overwrite"]
    command += ["--gradient_checkpointing", str(way["checkpointing"]).lower()]
    command += ["--per_device_train_batch_size", str(way["batch"])]
    command += ["--gradient_accumulation_steps", str(way["accumulation"])]
    if way["base"] == "int8":
        command += ["--base", "int8"]
    _, peak = run_alone(command)
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [row["step_time_ms"] for row in map(json.loads, lines) if "step_time_ms" in row]
    return {"peak_mib": peak / _MIB, "epoch_s": 1e-3 * statistics.fmean(steps[_WARM:] or steps) * len(steps)}


def _batch(given: argparse.Namespace) -> list[str]:
    return ["--per_device_train_batch_size", str(given.batch)]


def run_alone(command: list[str]) -> tuple[str, int]:
    """What a command of celora's prints, and the bytes of its peak."""
    started = [sys.executable, "-S", "-c", _PEAK, sys.executable, "-m", "celora", *command]
    done = subprocess.run(started, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"celora {' '.join(command)} failed with {done.returncode}")
    printed, _, peak = done.stdout.rstrip("\n").rpartition("\n")
    return printed, int(peak) * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, help="of a random Llama; without, the demo's model")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--stored", default="bfloat16", choices=("float32", "bfloat16"), help="dtype of its checkpoint")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--preset", help="one of them only")
    parser.add_argument("--keep", action="store_true", help=f"write the rows to {RESULTS.name}")
    given = parser.parse_args()
    turns = []
    with tempfile.TemporaryDirectory() as folder:
        model, data = make_inputs(given, Path(folder))
        name = "smollm2" if given.hidden is None else f"h{given.hidden}-b{given.blocks}"
        for _ in range(given.turns):
            turn = {}
            for way in estimated(model, data, given):
                with tempfile.TemporaryDirectory(dir=folder) as output:
                    own = {field: way[field] for field in FIELDS if field in way} | {"model": name, "rows": given.rows}
                    said = {"estimated_mib": way["peak_bytes"] / _MIB, "estimated_s": way["epoch_seconds"]}
                    turn[tuple(own.items())] = said | measured(way, model, data, Path(output))
            turns.append(turn)
    found = []
    for own in turns[0]:
        means = {name: statistics.fmean(turn[own][name] for turn in turns) for name in turns[0][own]}
        found.append(dict(own) | means | {"turns": given.turns} | rows.conditions(dict(own)["preset"]))
        _say(found[-1])
    if given.keep:
        rows.replace(RESULTS, found, FIELDS)


def _say(row: dict[str, Any]) -> None:
    memory, time = row["estimated_mib"] / row["peak_mib"], row["estimated_s"] / row["epoch_s"]
    print(f"{row['model']:10} {row['base']:9} {row['preset']:6} checkpointing {row['checkpointing']!s:5}  "
          f"{row['peak_mib']:6.0f} MiB, estimated {memory:.2f} of it; {row['epoch_s']:6.1f} s, {time:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
