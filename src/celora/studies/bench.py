"""`celora bench`: measures whole training steps and their parts, for plain PEFT and for celora.

An arm is one way to train, such as a preset. Every arm is a `transformers.Trainer` with its defaults and a model of its
own; all models share their frozen weights. The arms take turns on the same batches. Peak memory is measured in a
separate process for each arm.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from celora.errors import CELoraError, unknown
from celora.machine.memory import forget_peak, peak_memory
from celora.machine.own_process import of_module
from celora.machine.timing import percentiles
from celora.modeling.report import aligned
from celora.studies.cells import Cell, make_batches, told
from celora.studies.step import ARMS, PATCHING, Step, make_step, take_turns

QUICK_ARMS = ("PEFT", "exact", "paper", "auto", "fast", "limit")


def not_runnable(arm: str) -> str:
    """Why this arm cannot run on this machine; '' if it can."""
    package = {"Liger": "liger_kernel", "Unsloth": "unsloth"}.get(arm)
    if package and not torch.cuda.is_available():
        return "needs a CUDA device"
    if package and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    return ""


def measure(
    cell: Cell,
    arms: Sequence[str],
    *,
    repeats: int = 8,
    memory: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """One row for each arm: times of the step and its parts in ms, tokens per second, memory, speed-up over PEFT.

    Arms take turns, after the first steps of a run (`Step.settle`). Arms that patch Transformers come last, each in a
    process of its own. An arm that fails alone, perhaps for want of memory, has a row that says so.
    """
    for arm in arms:
        if arm not in ARMS:
            raise unknown("arm", arm, ARMS)
    batches = make_batches(cell)
    runnable = [arm for arm in arms if not not_runnable(arm)]
    with tempfile.TemporaryDirectory() as scratch:
        steps: dict[str, Step] = {}
        frozen: dict[str, Tensor] = {}
        for arm in (arm for arm in runnable if arm not in PATCHING):
            say(f"{cell.model}, {cell.data}, {cell.dtype}: preparing {arm}")
            steps[arm] = make_step(cell, arm, Path(scratch), frozen)
            steps[arm].settle(batches)
        say(f"{cell.model}, {cell.data}, {cell.dtype}: timing")
        times = take_turns(steps, batches, repeats)
        saved = {arm: step.saved(batches[0]) for arm, step in steps.items()}
        del steps
        frozen.clear()
        gc.collect()
        torch.cuda.empty_cache()  # for the processes below
        peaks: dict[str, int | None] = dict.fromkeys(runnable)
        failed: dict[str, str] = {}
        for arm in (arm for arm in runnable if memory or arm in PATCHING):
            say(f"{cell.model}, {cell.data}, {cell.dtype}: {arm} alone")
            try:
                found = _alone(cell, arm, Path(scratch), repeats)
            except CELoraError as error:
                failed[arm] = str(error)
                continue
            if memory:
                peaks[arm] = found["peak"]
            if arm in PATCHING:
                times[arm], saved[arm] = found["times"], found["saved"]
    real = statistics.fmean(int(batch["attention_mask"].sum()) for batch in batches)
    labelled = statistics.fmean(int((batch["labels"] != -100).sum()) for batch in batches)
    rows: list[dict[str, Any]] = []
    for arm in arms:
        row: dict[str, Any] = asdict(cell) | {"arm": arm, "tokens": round(real), "labelled": round(labelled / real, 3)}
        if reason := not_runnable(arm) or failed.get(arm):
            rows.append(row | {"not_run": reason})
            continue
        whole = percentiles([sum(parts) for parts in times[arm]])
        forward, backward, optimizer = map(statistics.median, zip(*times[arm], strict=True))
        row |= whole | {
            "forward_ms": round(forward, 3),
            "backward_ms": round(backward, 3),
            "optimizer_ms": round(optimizer, 3),
            "tokens_per_second": round(1e3 * real / whole["time_ms"], 1),
            "saved_for_backward": saved[arm],
            "peak_memory": peaks[arm],
        }
        rows.append(row)
    return _relative(rows)


def _relative(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add each arm's speed-up over PEFT, and the share of the possible saving that it reaches.

    The possible saving is the time that arm "limit of exact" saves or, if it was not measured, arm "limit". If that is
    not positive, no share is added.
    """
    by_arm = {row["arm"]: row["time_ms"] for row in rows if "time_ms" in row}
    plain, limit = by_arm.get("PEFT"), by_arm.get("limit of exact", by_arm.get("limit"))
    for row in rows:
        if plain and "time_ms" in row:
            row["speed_up"] = round(plain / row["time_ms"], 4)
            if limit and limit < plain:
                row["share_of_limit"] = round((plain - row["time_ms"]) / (plain - limit), 3)
    return rows


def _alone(cell: Cell, arm: str, folder: Path, repeats: int) -> dict[str, Any]:
    """A process that takes a few steps of this arm: its `peak` memory in bytes, without loading.

    Of an arm that patches Transformers also the `times` of its steps, and the bytes `saved` for backward.
    """
    asked = json.dumps({"cell": asdict(cell), "arm": arm, "folder": str(folder), "repeats": repeats})
    command, place = of_module(__name__, asked)
    done = subprocess.run(command, env=place, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise CELoraError(f"measuring {arm!r} alone failed: {last}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _run_alone(asked: dict[str, Any]) -> dict[str, Any]:
    cell = Cell(**asked["cell"])
    batches = make_batches(cell)
    step = make_step(cell, asked["arm"], Path(asked["folder"]), {})
    forget_peak(step.model.device)
    for batch in batches[:4]:
        step(batch)
    found: dict[str, Any] = {"peak": peak_memory(step.model.device)}
    if asked["arm"] in PATCHING:
        found["times"] = take_turns({asked["arm"]: step}, batches, asked["repeats"])[asked["arm"]]
        found["saved"] = step.saved(batches[0])
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table in text, one line for each arm of each cell."""
    lines = [("model", "data", "dtype", "arm", "ms/step", "20-80 %", "tokens/s", "speed-up", "of limit", "MiB peak")]
    for row in rows:
        name = (row["model"], row["data"], row["dtype"], row["arm"])
        if "not_run" in row:
            lines.append((*name, f"not run: {row['not_run']}", "", "", "", "", ""))
            continue
        peak, share = row["peak_memory"], row.get("share_of_limit")
        lines.append(
            (
                *name,
                f"{row['time_ms']:.0f}",
                f"{row['p20_ms']:.0f}-{row['p80_ms']:.0f}",
                f"{row['tokens_per_second']:.0f}",
                f"{row['speed_up']:.2f}" if "speed_up" in row else "",
                "" if share is None else f"{share:.0%}",
                "" if peak is None else f"{peak / 2**20:.0f}",
            )
        )
    return "\n".join([*aligned(lines), told(row["model"] for row in rows)])


if __name__ == "__main__":
    from celora.train.loading import quiet_libraries

    with quiet_libraries():
        print(json.dumps(_run_alone(json.loads(sys.argv[1]))))
