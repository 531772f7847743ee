"""What a run shows while it trains: metrics.jsonl (one JSON object for each log event) and a progress line.

Time is the wall-clock of the optimizer steps. Tokens are counted without padding. A resumed run continues both counts.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from celora.errors import CELoraError
from celora.files import check_regular, finite, json_lines, write_text
from celora.machine.allocator import give_back_freed_memory
from celora.machine.memory import forget_peak, peak_memory

PLAIN_EVERY_S = 10.0

# Trainer's own speeds include start-up and evaluation; tokens_per_second here does not.
_DROPPED = ("train_", "num_tokens", "eval_num_tokens", "num_input_tokens_seen", "total_flos", "epoch")


class _Lossy:
    """A stream to which writing never fails. A full disk or a closed terminal may lose lines, and ends no training.

    So may a handler of a signal that came while another line was being written: Python's stream raises RuntimeError.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, RuntimeError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, RuntimeError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def progress_console() -> Console:
    """A console on stderr for what a long command says. A line that cannot be written is lost."""
    if sys.stderr is None:  # closed; rich knows what to do
        return Console(stderr=True, highlight=False)
    return Console(file=cast(TextIO, _Lossy(sys.stderr)), highlight=False)


def say(console: Console, quiet: bool, line: str) -> None:
    """Print a line, without markup or wrapping, unless `quiet`."""
    if not quiet:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl. A line that is not a row is left out with a warning.

    The last line is left out without one: a crash may have cut it short.
    """
    rows: list[dict[str, Any]] = []
    check_regular(path)
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise CELoraError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int) and _numbers(row):
            rows.append(row)
        elif number < len(lines):
            warnings.warn(f"{path}:{number}: not a metrics row; it is left out.", stacklevel=2)
    return rows


def _numbers(row: dict[str, Any]) -> bool:
    """Whether every value is a number, or null (written for a number that was not finite)."""
    return all(isinstance(value, int | float | None) for value in row.values())


class StepTimer(TrainerCallback):  # type: ignore[misc]
    """Wall-clock of optimizer steps, from the first micro-batch's forward to the optimizer's step."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0
        self._begin: float | None = None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if self._begin is not None:
            self.seconds += time.perf_counter() - self._begin
            self.steps += 1


PHASES = ("forward", "backward", "optimizer")


class Phases(TrainerCallback):  # type: ignore[misc]
    """Times the phases of optimizer steps. On CPU only: on a GPU the clock would see launches, not work."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._begin: float | None = None

    @contextmanager
    def timing(self, phase: str, *, without: str | None = None) -> Iterator[None]:
        """Add the time of the body to `phase`, minus the time that phase `without` gets during it."""
        begin, before = time.perf_counter(), self.seconds[without] if without else 0.0
        yield
        inside = self.seconds[without] - before if without else 0.0
        self.seconds[phase] += time.perf_counter() - begin - inside

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._begin = time.perf_counter()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        if self._begin is not None:
            self.seconds["optimizer"] += time.perf_counter() - self._begin


class MetricsWriter(StepTimer):
    """Appends one row for each log event.

    A row has step, epoch, seconds, loss, learning_rate, grad_norm, tokens_seen, tokens_per_second, step_time_ms and its
    parts, peak_memory_mib, and every eval_* and celora/* value. A number that is not finite is null.
    """

    def __init__(self, path: Path, *, after_step: int = 0, seconds: float = 0.0, phases: Phases | None = None) -> None:
        super().__init__()
        self.path = path
        self.phases = phases
        self._phases_before = dict.fromkeys(PHASES, 0.0)
        self._earlier = seconds
        self._start = time.perf_counter()
        self._last = (0, 0.0, 0)  # steps, seconds and tokens at the last training row
        # A resumed run repeats the steps after its checkpoint. Without this, their rows would appear twice.
        kept = [row for row in read_metrics(path) if row["step"] <= after_step]
        write_text(path, json_lines(kept))

    def elapsed(self) -> float:
        """Seconds of training so far, over all resumptions."""
        return self._earlier + time.perf_counter() - self._start

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._start = time.perf_counter()
        self._last = (0, 0.0, int(state.num_input_tokens_seen))
        give_back_freed_memory()  # what loading or another run has freed
        forget_peak(args.device)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kw: Any,
    ) -> None:
        logs = logs or {}
        if not state.is_world_process_zero or not any(key == "loss" or key.startswith("eval_") for key in logs):
            return
        row: dict[str, Any] = {
            "step": state.global_step,
            "epoch": logs.get("epoch"),
            "seconds": round(self.elapsed(), 4),
        }
        row |= {key: value for key, value in logs.items() if not key.startswith(_DROPPED)}
        if "loss" in logs:
            tokens = int(state.num_input_tokens_seen)
            steps, seconds = self.steps - self._last[0], self.seconds - self._last[1]
            if steps and seconds > 0:
                row["step_time_ms"] = round(1e3 * seconds / steps, 3)
                if self.phases is not None and args.device.type == "cpu":
                    now = dict(self.phases.seconds)
                    for phase in PHASES:
                        row[f"{phase}_ms"] = round(1e3 * (now[phase] - self._phases_before[phase]) / steps, 3)
                    self._phases_before = now
                peak = peak_memory(args.device)
                if peak is not None:
                    row["peak_memory_mib"] = round(peak / 2**20, 1)
                if tokens:
                    row["tokens_seen"] = tokens
                    row["tokens_per_second"] = round((tokens - self._last[2]) / seconds, 1)
            self._last = (self.steps, self.seconds, tokens)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite(row), default=float, allow_nan=False) + "\n")
        except OSError as error:
            raise CELoraError(f"cannot write {str(self.path)!r}: {error.strerror or error}") from error


class ProgressLine(StepTimer):
    """Shows a bar on a terminal, and a plain line every ten seconds elsewhere; nothing when quiet."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        super().__init__()
        self.console = console
        self.quiet = quiet
        self._bar: Progress | None = None
        self._loss = "-"
        self._first_step = 0
        self._first_tokens = 0
        self._printed = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._first_step, self._first_tokens = state.global_step, int(state.num_input_tokens_seen)
        self._printed = time.perf_counter()
        if self.quiet or not state.is_world_process_zero or not self.console.is_terminal:
            return
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[numbers]}"))
        self._bar = Progress(*columns, console=self.console, transient=True)
        self._bar.add_task("train", total=state.max_steps, completed=state.global_step, numbers="")
        self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        super().on_step_end(args, state, control, **kw)
        self._show(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kw: Any,
    ) -> None:
        if logs and "loss" in logs:
            self._loss = f"{logs['loss']:.4f}"
            self._show(state, last=state.global_step >= state.max_steps)

    def _show(self, state: TrainerState, *, last: bool = False) -> None:
        if self.quiet or not state.is_world_process_zero:
            return
        tokens = int(state.num_input_tokens_seen) - self._first_tokens
        speed = f"{tokens / self.seconds:,.0f} tokens/s" if tokens and self.seconds else ""
        # rich only remembers 30 seconds, so its own estimate fails if a step takes longer.
        per_step = self.seconds / max(1, state.global_step - self._first_step)
        left = f"{per_step * (state.max_steps - state.global_step) / 60:.1f} min left"
        numbers = "  ".join(filter(None, (f"loss {self._loss}", speed, left)))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step, numbers=numbers)
        elif last or time.perf_counter() - self._printed >= PLAIN_EVERY_S:
            self._printed = time.perf_counter()
            line = f"step {state.global_step}/{state.max_steps}  {numbers}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar off the terminal; safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.close()
