"""Run `celora train` on a tiny model, SIGKILL it at given moments, resume it until it ends, and compare the parameters.

    python tests/helpers/kill.py FOLDER CASES.json      one JSON line for each case

A case is {"mode": a name from MODES, "moments": [[kind, share], ...]}. The run is killed at the first moment, the
resumed run at the second, and so on. Kinds of moments:

- "event": a share of the run's file operations in its output folder. They are counted, so the moment is always the
  same.
- "time": a share of its wall-clock, from start to end.
- "write": the run is killed when it first touches the file of that name, as in ["write", "report.html"].
- "full": from that file operation on, no file of that process can grow, as on a full disk.
- "locked": another run has locked the folder.

In modes of two processes, a moment [kind, share, rank] kills one process, and our own launcher ends the other, like
torchrun.

The slow imports happen once. Every run is a fork of that process.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

# Preset auto by its rule. Refreshes make some layers exact, and the head. A low bound and a high rate see to it: so few
# tokens lose little.
_MOVING = [
    "--preset", "auto", "--learning_rate", "0.05", "--celora",
    '{"most_error": 0.0005, "refresh_every": 4, "head_keep_ratio": 0.3, "overrides": {"*_proj": '
    '{"estimator": "tokens", "selection": "energy", "keep_ratio": 0.9997, "precision": "native"}}}',
]  # fmt: skip
MODES: dict[str, list[str]] = {
    "plain": ["--max_steps", "6", "--save_steps", "2", "--per_device_train_batch_size", "4",
              "--lora_dropout", "0.1", "--celora", '{"keep_ratio": 0.4, "rank": 4, "refresh_every": 4}'],
    "accumulated": ["--num_train_epochs", "2", "--save_steps", "3", "--per_device_train_batch_size", "3",
                    "--gradient_accumulation_steps", "2", "--celora",
                    '{"estimator": "tokens", "selection": "sampled", "rank": 0, "refresh_every": 3}'],
    "checkpointed": ["--max_steps", "5", "--save_steps", "1", "--save_total_limit", "1",
                     "--per_device_train_batch_size", "4", "--gradient_checkpointing", "true", "--preset", "paper"],
    "auto": ["--max_steps", "6", "--save_steps", "2", "--per_device_train_batch_size", "4", *_MOVING],
    "two": ["--max_steps", "6", "--save_steps", "2", "--per_device_train_batch_size", "2", "--lora_dropout", "0.1",
            "--celora", '{"keep_ratio": 0.4, "rank": 4, "refresh_every": 4, "overrides": {"up_proj": '
            '{"estimator": "tokens", "selection": "sampled", "rank": 0}}}'],
    # Each process selects by its own tokens. Both make the same layers exact, at the same steps.
    "two auto": ["--max_steps", "6", "--save_steps", "2", "--per_device_train_batch_size", "2", *_MOVING],
    "two alike": ["--max_steps", "5", "--save_steps", "1", "--save_total_limit", "1",
                  "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--celora",
                  '{"keep_ratio": 0.4, "rank": 4, "refresh_every": 3, "synchronise": true, "target_error": 0.4}'],
}  # fmt: skip
# A queue or a supervisor gives the same whole command at every start.
MODES["always --resume"] = [*MODES["plain"], "--resume"]
PROCESSES = {mode: 2 if mode.startswith("two") else 1 for mode in MODES}
_WRITES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


def fork(work: Any) -> int:
    """Fork a child that calls `work()` and exits with its result. Returns the child's process id."""
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


def train(
    inputs: Path, output: Path, mode: str, *, resume: bool, die_at: int | str | None = None, full: bool = False,
    count: Path | None = None,
) -> int:  # fmt: skip
    """Run `celora train`. At file operation `die_at` (a number, or a file's name) it is killed, or its disk is full.

    Without `die_at`, file operations are counted in `count`.
    """
    from celora.cli.main import main

    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in _WRITES and str(arguments[0]).startswith(str(output)):
            seen += 1
            if seen == die_at and full:
                import resource  # Windows has no `resource`, and imports this file, too

                resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
            elif die_at in (seen, str(arguments[0])):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    given = ["--model", str(inputs / "model"), "--data", str(inputs / "rows.jsonl"), *MODES[mode], "--quiet"]
    status = main(["train", "--output", str(output), *(["--resume"] if resume and "--resume" not in given else given)])
    if count is not None:
        count.write_text(str(seen))
    return status


def launch(
    inputs: Path, output: Path, mode: str, *, rank: int = 0, die_at: int | str | None = None,
    full: bool = False, after_s: float | None = None, count: Path | None = None,
) -> tuple[bool, int]:  # fmt: skip
    """One run, in as many processes as its mode has. It resumes if it can.

    The process `rank` is killed at its `die_at`-th file operation, or after `after_s` seconds; the other one is ended.
    Returns whether it was killed, and the exit status.
    """
    resume = (output / "run.json").exists() or (output / ".replaced").exists()
    number = PROCESSES[mode]
    store = None
    if number > 1:
        from torch.distributed import TCPStore

        # the launcher owns the store, as under torchrun
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    own = [
        {
            "resume": resume,
            "full": full,
            "die_at": die_at if each == rank else None,
            "count": count and Path(f"{count}.{each}"),
        }
        for each in range(number)
    ]
    children = []
    for each in range(number):
        if store is not None:
            os.environ |= {"RANK": str(each), "LOCAL_RANK": str(each), "WORLD_SIZE": str(number),
                           "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
                           "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
        children.append(fork(lambda each=each: train(inputs, output, mode, **own[each])))
    if after_s is not None:
        time.sleep(after_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(children[rank], signal.SIGKILL)
    return _ended(children)


def _ended(children: list[int]) -> tuple[bool, int]:
    """Wait for all processes. If one fails, ask the others to end, and kill them after 20 s."""
    killed, status, asked = False, 0, 0.0
    left = {*children}
    while left:
        if asked and time.monotonic() - asked > 20:
            raise SystemExit("a process waits for one that is gone")
        for child in [*left]:
            found, how = os.waitpid(child, os.WNOHANG)
            if not found:
                continue
            left.remove(child)
            killed |= os.WIFSIGNALED(how) and os.WTERMSIG(how) == signal.SIGKILL
            status = status or os.waitstatus_to_exitcode(how)
            if how and not asked:
                asked = time.monotonic()
                for other in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(other, signal.SIGTERM)
        time.sleep(0.01)
    return killed, status


def case(folder: Path, mode: str, moments: list[list[Any]], whole: dict[str, Any]) -> dict[str, Any]:
    """Kill the run at `moments`, resume it to its end, and return the outcome."""
    output = folder / "killed"
    shutil.rmtree(output, ignore_errors=True)
    kills, ended, left = 0, [], []
    for kind, share, *which in moments:
        rank = which[0] if which else 0
        moment: dict[str, Any] = {}
        if kind in ("event", "full"):
            moment = {"die_at": 1 + int(share * whole["events"][rank]), "full": kind == "full"}
        elif kind == "write":
            moment = {"die_at": str(output / share)}
        elif kind == "time":
            moment = {"after_s": share * whole["seconds"]}
        if kind == "locked":
            output.mkdir(exist_ok=True)
        with FileLock(output / "_celora.lock") if kind == "locked" else contextlib.nullcontext():
            killed, status = launch(folder, output, mode, rank=rank, **moment)
        kills += killed
        ended.append(status)
        left.append(sorted(p.name for p in output.iterdir()) if output.exists() else [])
    _, status = launch(folder, output, mode)
    same = status == 0 and adapter(output) == whole["adapter"] and losses(output) == whole["losses"]
    same = same and moves(output) == whole["moves"]
    report, record = output / "report.html", output / "run.json"
    same = same and report.exists() and report.stat().st_mtime_ns >= record.stat().st_mtime_ns
    return {"mode": mode, "moments": moments, "kills": kills, "ended": ended, "status": status, "same": same,
            "moves": len(whole["moves"]), "left": left}  # fmt: skip


def adapter(output: Path) -> bytes:
    """The adapter's file: the names and every bit of the parameters."""
    return (output / "adapter_model.safetensors").read_bytes()


def losses(output: Path) -> list[Any]:
    """Step and loss of every row of the metrics."""
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def moves(output: Path) -> list[Any]:
    """The changes that refreshes made to the rule of preset auto."""
    return list(json.loads((output / "run.json").read_text())["moves"])


def whole_run(folder: Path, mode: str, *, timed: bool) -> dict[str, Any]:
    """The uninterrupted run that others are compared with.

    If its time matters, a first run warms the caches, and the second one counts.
    """
    for name in ("warm", "whole") if timed else ("whole",):
        output, began = folder / f"{name}-{mode}", time.perf_counter()
        if launch(folder, output, mode, count=folder / "count")[1]:
            raise SystemExit(f"the uninterrupted run of {mode} failed")
        seconds = time.perf_counter() - began
    events = [int((folder / f"count.{rank}").read_text()) for rank in range(PROCESSES[mode])]
    found = {"adapter": adapter(output), "losses": losses(output), "moves": moves(output)}
    return found | {"seconds": seconds, "events": events}


def prepare(folder: Path) -> int:
    """Make the inputs, and tell the modules that a run imports on its way."""
    from tiny import save_rows, save_tiny_model

    save_tiny_model(folder / "model")
    save_rows(folder / "rows.jsonl", 18)
    status = train(folder, folder / "first", "plain", resume=False)
    (folder / "modules.json").write_text(json.dumps([*sys.modules]))
    return status


def import_ahead(names: list[str]) -> None:
    """Import these once here, not in every fork, and keep forks from looking for garbage among them."""
    for name in names:
        with contextlib.suppress(Exception):  # some modules refuse to be imported by their own name
            importlib.import_module(name)
    gc.collect()
    gc.freeze()


def look_ahead(folder: Path) -> None:
    """Let transformers and celora make once here what they keep for later: patterns, names, metadata of packages."""
    from transformers import AutoModelForCausalLM

    from celora.train.request.names import trl_names

    trl_names()
    importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)
    AutoModelForCausalLM.from_pretrained(folder / "model")


@contextlib.contextmanager
def said_through_a_pipe() -> Iterator[None]:
    """Where no file can grow, a run can still say so, if what it says goes into a pipe."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=2) as cat:
        own = os.dup(2)
        os.dup2(cat.stdin.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(own, 2)  # cat ends once nothing can write to it


def run(folder: Path, cases: list[dict[str, Any]]) -> None:
    os.waitpid(fork(lambda: prepare(folder)), 0)
    look_ahead(folder)
    import_ahead(json.loads((folder / "modules.json").read_text()))
    whole: dict[str, dict[str, Any]] = {}
    timed = any(kind == "time" for one in cases for kind, *_ in one["moments"])
    for one in cases:
        mode = one["mode"]
        if mode not in whole:
            whole[mode] = whole_run(folder, mode, timed=timed)
        print(json.dumps(case(folder, mode, one["moments"], whole[mode])), flush=True)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    os.environ |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    import celora.train.run  # noqa: F401 - once, for all runs

    with said_through_a_pipe():
        run(folder, json.loads(Path(sys.argv[2]).read_text()))
