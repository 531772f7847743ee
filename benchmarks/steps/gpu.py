"""Whole training steps on an NVIDIA GPU, at the shapes of Llama 1B, 3B and 8B. Run by `benchmarks.gpu`.

Arms are measured one after the other, each with a model of its own that is gone before the next one is made. So the
peak is the arm's, and an arm that fails costs no other's row. `TRL + PEFT, again` shows how far times move meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import itertools
import shlex
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import celora
from benchmarks import rows
from benchmarks.steps.trl_step import TRLStep
from celora.kernels.backends import chosen
from celora.machine.memory import forget_peak, peak_memory
from celora.machine.packages import package_version
from celora.machine.timing import percentiles
from celora.studies.bench import not_runnable
from celora.studies.cells import LLAMAS, Cell, make_batches, make_model
from celora.studies.step import Step, attach_arm, make_step

ROWS = Path(__file__).with_name("gpu.jsonl")
FIELDS = ("model", "data", "dtype", "tokens", "arm", "commit")  # a table is of one commit, and keeps its baseline
CELLS = tuple(Cell(model, data, tokens=2048) for model in reversed(LLAMAS) for data in ("full", "instruct"))
BASE, LIGER = "TRL + PEFT", "TRL + PEFT + Liger"
COMPARED = (BASE, "limit of exact")  # what the ratios of a table need
INT8, GRAPHS, AGAIN = "fast, int8 base", "exact, CUDA graphs", f"{BASE}, again"
ARMS = {
    BASE: "TRL's SFTTrainer around a PEFT model, bf16 autocast, no checkpointing",
    "exact": "celora's preset exact in the same trainer, as all arms but Unsloth",
    "fast": "celora's preset fast: 8 bits in both directions, beside the base",
    INT8: "the same on a base in int8, which is the only copy",
    "limit of exact": "preset exact with a free grad_input of the adapted layers (zeros: does not train)",
    LIGER: "TRL + PEFT with Liger's kernels, all but its head, as TRL uses them",
    GRAPHS: "preset exact, decoder and head in CUDA graphs: `celora.compile_model`",
    "Unsloth": "Unsloth's own LoRA in Transformers' Trainer, without TRL's metrics",
    AGAIN: "TRL + PEFT once more, at the end",
}
# In a process that ends at the deadline: they are slow to prepare, or change Transformers for the whole process.
ALONE = (LIGER, "Unsloth", GRAPHS)
REPEATS = 12
PROCESSES = get_context("spawn")
_PATIENCE_S = 10  # for a process that was told to end

Job = tuple[Cell, str]


def measure(arms: Iterable[str], deadline: float, cells: Iterable[Cell] = CELLS) -> None:
    """Write a row for each arm of each cell until `deadline` (of `time.monotonic`). Say what is left out.

    The baseline with Liger is first, as the others are compared with it. Then, cell by cell, those that need no process
    of their own, and the rest in the order of `ARMS`.
    """
    cells, arms = tuple(cells), [arm for arm in ARMS if arm in set(arms)]
    apart = [[arm] for arm in arms if arm in (*ALONE, AGAIN)]
    together, left = [arm for arm in arms if [arm] not in apart], list[Job]()
    for group in sorted(filter(None, [together, *apart]), key=lambda group: group != [LIGER]):
        jobs = [(cell, arm) for cell in cells for arm in group]
        if group[0] in ALONE and not missing(group[0]):
            left += _measure_alone(jobs, deadline)
        else:
            left += _measure(jobs, deadline)
    if left:
        names = ", ".join(f"{arm} of {cell.model} {cell.data}" for cell, arm in left)
        again = shlex.join(arm for arm in ARMS if arm in {arm for _, arm in left})
        print(
            f"left out, for want of time: {names}; `python benchmarks/gpu.py --minutes 60 --arms {again}` measures "
            "these arms",
            flush=True,
        )


def _measure(jobs: Sequence[Job], deadline: float, done: Callable[[], object] = lambda: None) -> list[Job]:
    """Write the rows of these jobs, and call `done` after each. Gives the jobs that had not begun at the deadline."""
    for number, (cell, arm) in enumerate(jobs):
        if time.monotonic() > deadline:
            return list(jobs[number:])
        row = row_of(cell, arm)
        rows.replace(ROWS, [row], FIELDS)
        said = row["not_run"] if "not_run" in row else f"{row['time_ms']:.1f} ms, {row['peak_memory'] / 2**30:.1f} GiB"
        print(f"{cell.model} {cell.data}, {arm}: {said}", flush=True)
        done()
    return []


def _measure_alone(jobs: Sequence[Job], deadline: float) -> list[Job]:
    """The same in a process of its own, which ends at the deadline. Gives the jobs that had not ended then."""
    done = PROCESSES.Value("i", 0, lock=False)
    process = PROCESSES.Process(target=_alone, args=(jobs, deadline, done))
    process.start()
    process.join(max(0, deadline - time.monotonic()))
    if process.is_alive():
        process.terminate()
        process.join(_PATIENCE_S)
        process.kill()
        process.join()
    elif process.exitcode:
        print(f"{jobs[0][1]}: its process ended with status {process.exitcode}", flush=True)
        return []
    return list(jobs[done.value :])


def _alone(jobs: Sequence[Job], deadline: float, done: Any) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that temporary folders are removed

    def count() -> None:
        done.value += 1

    _measure(jobs, deadline, count)


def missing(arm: str) -> str:
    """Why this arm cannot run here; '' if it can."""
    if arm != "Unsloth" and importlib.util.find_spec("trl") is None:
        return "trl is not installed"
    return not_runnable("Liger" if arm == LIGER else arm)


def row_of(cell: Cell, arm: str) -> dict[str, Any]:
    """What the steps of an arm take, or why it did not run."""
    row = asdict(cell) | {"arm": arm} | rows.conditions(arm)
    row |= {name: package_version(name) for name in ("trl", "peft", "transformers")}
    if reason := missing(arm):
        return row | {"not_run": reason}
    try:
        return row | steps_of(cell, arm)
    except Exception as error:  # out of memory, or another package's own: the other arms go on
        first = (str(error).strip().splitlines() or [""])[0]
        return row | {"not_run": f"{type(error).__name__}: {first}"[:200]}
    finally:
        gc.collect()
        with contextlib.suppress(RuntimeError):  # a GPU that failed for good refuses: then every row says so
            torch.cuda.empty_cache()


def steps_of(cell: Cell, arm: str) -> dict[str, Any]:
    """Times of whole steps and of their parts, peak memory, and how often a step waits for the GPU.

    The peak is what torch allocates at most in these steps, the model and the optimizer included.
    """
    batches, begun = make_batches(cell), time.monotonic()
    before, on_gpu = torch.cuda.memory_allocated(), torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        step = _step(cell, arm, Path(folder))
        step.settle(batches)
        for batch in batches:
            step(batch)
        prepared = time.monotonic() - begun
        device = step.model.device
        forget_peak(device)
        used = list(itertools.islice(itertools.cycle(batches), REPEATS))
        parts = [step(batch) for batch in used]
        peak = peak_memory(device)
        there = {name: value.to(device) for name, value in batches[0].items()}
        waited = waits(functools.partial(step, there)) if on_gpu else None
    forward, backward, optimizer = (percentiles(list(times))["time_ms"] for times in zip(*parts, strict=True))
    whole = [sum(times) for times in parts]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in used)
    return percentiles(whole) | {
        "forward_ms": forward,
        "backward_ms": backward,
        "optimizer_ms": optimizer,
        "tokens_per_second": round(1e3 * tokens / sum(whole), 1),
        "peak_memory": None if peak is None else peak - before,
        "waits": waited,
        "prepared_s": round(prepared, 1),
        "by": chosen(getattr(torch, cell.dtype), device),
    }


def _step(cell: Cell, arm: str, folder: Path) -> Step:
    if arm == "Unsloth":
        return make_step(cell, arm, folder, {})
    model = make_model(cell)
    if arm == INT8:
        celora.quantise_base(model)
    step = TRLStep(model, folder, liger=arm == LIGER)
    attach_arm(model, {INT8: "fast", GRAPHS: "exact"}.get(arm, arm))
    if arm == GRAPHS:
        celora.compile_model(model, mode="reduce-overhead", fullgraph=True)
    return step


def waits(call: Callable[[], object]) -> int:
    """How often `call` waits for the GPU, as torch notices it."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchroniz" in str(warning.message) for warning in said)
