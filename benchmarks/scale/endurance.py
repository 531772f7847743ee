"""Hours of `celora train`, watched from outside: memory, open files and processor time per step must stay flat.

SmolLM2-135M-Instruct in the dtype that is faster here, LoRA r=16, 4 sentences a step, grouped by length, so every batch
has another shape. Every estimator and every saving is in use, with refreshes in turns, moving keep ratios, an
evaluation and a checkpoint every 50 steps. A row is written for every 50 steps:

* `rss_mib`: the median of the resident memory, measured four times a second; `rss_most_mib`: the largest;
* `open_files`: at the end of the last step;
* `cpu_ms_per_step`: processor time of all threads, with evaluation and checkpoint. Wall-clock would also show how busy
  the machine is with other things.

`python -m benchmarks.scale.endurance run --minutes 120` appends to `endurance.jsonl`. It can be resumed; earlier
minutes count. `python -m benchmarks.scale.endurance judge` says whether the last 80 % of the longest time in one
process are flat. It reads /proc, so it needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import rows
from celora.machine.timing import faster_dtype
from celora.studies.assets import demo_model, rated_sentences

EVERY, LOOK_EVERY_S = 50, 0.25
RESULTS = Path(__file__).with_name("endurance.jsonl")
CONFIG = {
    "estimator": "int8",
    "refresh_every": 40,
    "spread": True,
    "target_error": 0.3,
    "overrides": {
        "q_proj": {"estimator": "dense"},
        "v_proj": {"estimator": "columns", "keep_ratio": 0.55},
        "o_proj": {"estimator": "columns", "keep_ratio": 0.55, "selection": "energy"},
        "gate_proj": {"estimator": "tokens", "keep_ratio": 0.8, "rank": 8},
        "up_proj": {"estimator": "tokens", "keep_ratio": 0.99, "rank": 0, "selection": "energy", "precision": "int8"},
    },
    "fused": True,
    "labelled_head": True,
    "padding_free": True,
    "zero_tokens": True,
}
SETTINGS = {
    "max_steps": 1_000_000,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-5,
    "lr_scheduler_type": "constant",
    "max_length": 128,
    "train_sampling_strategy": "group_by_length",  # the longest batch comes first, so peak memory is reached at once
    "lora_r": 16,
    "eval_strategy": "steps",
    "eval_steps": EVERY,
    "save_steps": EVERY,
}
# Flat means: a straight line through the rows changes by at most this, from the first row to the last.
MEMORY_BAR, TIME_BAR = 0.02, 0.05


class Process:
    """What Linux knows about a running process."""

    def __init__(self, pid: int) -> None:
        self._of = Path(f"/proc/{pid}")

    def rss_mib(self) -> float:
        pages = int((self._of / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def cpu_s(self) -> float:
        fields = (self._of / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def open_files(self) -> int:
        return len(list((self._of / "fd").iterdir()))


def command(folder: Path) -> list[str]:
    """Start `celora train`, or resume the run in the folder; its rows are written first."""
    train = [sys.executable, "-m", "celora", "train", "--quiet", "--output", str(folder / "out")]
    if (folder / "out" / "run.json").exists():
        return [*train, "--resume"]
    folder.mkdir(parents=True, exist_ok=True)
    texts = [json.dumps({"text": review.text}) + "\n" for review in rated_sentences("movie")]
    (folder / "train.jsonl").write_text("".join(texts[64:]), encoding="utf-8")
    (folder / "eval.jsonl").write_text("".join(texts[:64]), encoding="utf-8")
    own = {"model": demo_model(), "data": folder / "train.jsonl", "eval_data": folder / "eval.jsonl"}
    named = [f"--{name}={value}" for name, value in (own | {"dtype": faster_dtype()} | SETTINGS).items()]
    return [*train, *named, "--celora", json.dumps(CONFIG)]


def last_step(metrics: Path) -> int:
    """The step of the last row of the metrics; read from the end of the file, which grows."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 2**14))
        lines = file.read().splitlines(keepends=True)
    whole = [line for line in lines[-2:] if line.endswith(b"\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def run(folder: Path, minutes: float) -> None:
    earlier = rows.found(RESULTS)
    number = max((row["process"] for row in earlier), default=0) + 1
    left = 60 * minutes - sum(stretch[-1]["seconds"] for stretch in stretches(earlier))
    conditions = rows.conditions()
    child = subprocess.Popen(command(folder), start_new_session=False)
    watched, began = Process(child.pid), time.monotonic()
    held, at, cpu = list[float](), 0, 0.0
    try:
        while child.poll() is None and time.monotonic() - began < left:
            time.sleep(LOOK_EVERY_S)
            step, now = last_step(folder / "out" / "metrics.jsonl"), watched.cpu_s()
            held.append(watched.rss_mib())
            if step // EVERY > at // EVERY:
                if at > 0:  # else: since it was started, or resumed, which is not a step's time
                    row = {
                        "process": number,
                        "step": step,
                        "seconds": round(time.monotonic() - began, 1),
                        "rss_mib": round(statistics.median(held), 1),
                        "rss_most_mib": round(max(held), 1),
                        "open_files": watched.open_files(),
                        "cpu_ms_per_step": round(1e3 * (now - cpu) / (step - at), 1),
                    }
                    rows.append(RESULTS, row | conditions)
                held, at, cpu = [], step, now
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)  # celora saves at the end of the step
        status = child.wait()
    if status != 130:
        raise SystemExit(f"celora train ended with exit status {status}")


def stretches(found: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of each process."""
    return [[row for row in found if row["process"] == number] for number in sorted({row["process"] for row in found})]


def drift(values: list[float]) -> float:
    """By how much of their mean a straight line through `values` rises from the first to the last."""
    slope = statistics.linear_regression(range(len(values)), values).slope
    return slope * (len(values) - 1) / statistics.fmean(values)


def judge() -> bool:
    """Print the verdict on the longest time in one process; whether all is flat."""
    stretch = max(stretches(rows.read(RESULTS)), key=lambda rows_of_one: float(rows_of_one[-1]["seconds"]))
    late = [row for row in stretch if row["seconds"] >= 0.2 * stretch[-1]["seconds"]]
    memory, spent = (drift([row[name] for row in late]) for name in ("rss_mib", "cpu_ms_per_step"))
    rss, files = ([row[name] for row in late] for name in ("rss_mib", "open_files"))
    minutes = stretch[-1]["seconds"] / 60
    print(f"{minutes:.0f} minutes in one process, to step {stretch[-1]['step']}; of the last 80 % ({len(late)} rows):")
    print(f"memory: {min(rss):.0f} to {max(rss):.0f} MiB, drift {memory:+.2%} (bar {MEMORY_BAR:.0%})")
    print(f"open files: {min(files)} to {max(files)}")
    mean = statistics.fmean(row["cpu_ms_per_step"] for row in late)
    print(f"processor time per step: {mean:.0f} ms, drift {spent:+.2%} (bar {TIME_BAR:.0%})")
    flat = abs(memory) < MEMORY_BAR and max(files) <= late[0]["open_files"] and spent < TIME_BAR
    print("flat" if flat else "not flat")
    return flat


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "judge"])
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "celora-endurance")
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments.folder, arguments.minutes)
    raise SystemExit(0 if judge() else 1)
