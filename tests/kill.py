"""Run `celora train` on a tiny model, SIGKILL it at given moments, resume it until it ends, and compare the parameters.

    python tests/kill.py FOLDER CASES.json      one JSON line for each case

A case is {"mode": a name from MODES, "moments": [[kind, share], ...]}: the run is killed at the first moment, what goes
on from there at the second, and so on. With the kind "event" the share is of the run's file operations in its output
folder (they are counted, so the moment is the same every time); with "time" it is of its wall-clock, start to end.

The heavy imports happen once; every run is a fork of that process and dies like one of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

MODES: dict[str, list[str]] = {
    "plain": ["--max_steps", "6", "--save_steps", "2", "--per_device_train_batch_size", "4",
              "--lora_dropout", "0.1", "--celora", '{"keep_ratio": 0.4, "rank": 4, "refresh_every": 4}'],
    "accumulated": ["--num_train_epochs", "2", "--save_steps", "3", "--per_device_train_batch_size", "3",
                    "--gradient_accumulation_steps", "2", "--celora",
                    '{"estimator": "tokens", "selection": "sampled", "rank": 0, "refresh_every": 3}'],
    "checkpointed": ["--max_steps", "5", "--save_steps", "1", "--save_total_limit", "1",
                     "--per_device_train_batch_size", "4", "--gradient_checkpointing", "true", "--preset", "paper"],
}  # fmt: skip
_WRITES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


def fork(work: Any) -> int:
    """The process id of a child that does `work()` and exits with what it returns."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            status = work()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return child


def train(inputs: Path, output: Path, mode: str, *, die_at: int | None = None, count: Path | None = None) -> int:
    """`celora train`, resumed if it can be; killed at its `die_at`-th file operation, or these written to `count`."""
    from celora.cli import main

    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in _WRITES and str(arguments[0]).startswith(str(output)):
            seen += 1
            if seen == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    given = ["--model", str(inputs / "model"), "--data", str(inputs / "rows.jsonl"), *MODES[mode], "--quiet"]
    more = ["--resume"] if (output / "run.json").exists() or (output / ".replaced").exists() else given
    status = main(["train", "--output", str(output), *more])
    if count is not None:
        count.write_text(str(seen))
    return status


def case(folder: Path, mode: str, moments: list[tuple[str, float]], whole: dict[str, Any]) -> dict[str, Any]:
    """Kill at `moments`, go on to the end, and say what came out."""
    output = folder / "killed"
    shutil.rmtree(output, ignore_errors=True)
    kills, left = 0, []
    for kind, share in moments:
        die_at = 1 + int(share * whole["events"]) if kind == "event" else None
        child = fork(lambda die_at=die_at: train(folder, output, mode, die_at=die_at))
        if kind == "time":
            time.sleep(share * whole["seconds"])
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        left.append(sorted(p.name for p in output.iterdir()) if output.exists() else [])
    status = os.waitstatus_to_exitcode(os.waitpid(fork(lambda: train(folder, output, mode)), 0)[1])
    same = status == 0 and adapter(output) == whole["adapter"] and losses(output) == whole["losses"]
    return {"mode": mode, "moments": moments, "kills": kills, "status": status, "same": same, "left": left}


def adapter(output: Path) -> bytes:
    """The adapter's file: the names and every bit of the parameters."""
    return (output / "adapter_model.safetensors").read_bytes()


def losses(output: Path) -> list[Any]:
    """Step and loss of every row of the metrics."""
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def whole_run(folder: Path, mode: str, *, timed: bool) -> dict[str, Any]:
    """The uninterrupted run that others are compared with; if its time matters, the second of two: caches are warm."""
    for name in ("warm", "whole") if timed else ("whole",):
        output, began = folder / f"{name}-{mode}", time.perf_counter()
        child = fork(lambda output=output: train(folder, output, mode, count=folder / "count"))
        if os.waitpid(child, 0)[1]:
            raise SystemExit(f"the uninterrupted run of {mode} failed")
        seconds = time.perf_counter() - began
    return {"adapter": adapter(output), "losses": losses(output), "seconds": seconds,
            "events": int((folder / "count").read_text())}  # fmt: skip


def prepare(folder: Path) -> int:
    from tiny import save_rows, save_tiny_model

    save_tiny_model(folder / "model")
    save_rows(folder / "rows.jsonl", 18)
    return 0


def run(folder: Path, cases: list[dict[str, Any]]) -> None:
    os.waitpid(fork(lambda: prepare(folder)), 0)
    whole: dict[str, dict[str, Any]] = {}
    timed = any(kind == "time" for one in cases for kind, _ in one["moments"])
    for one in cases:
        mode = one["mode"]
        if mode not in whole:
            whole[mode] = whole_run(folder, mode, timed=timed)
        print(json.dumps(case(folder, mode, one["moments"], whole[mode])), flush=True)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    os.environ |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    import celora.train.run  # noqa: F401 - once, for all runs

    run(folder, json.loads(Path(sys.argv[2]).read_text()))
