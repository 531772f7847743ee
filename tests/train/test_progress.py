"""Metrics rows and the progress line, driven by events that the test makes itself."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from celora.train import progress
from celora.train.progress import MetricsWriter, ProgressLine, progress_console, read_metrics, say
from celora.train.request.arguments import parse
from celora.train.run import train
from forked import code, run
from runs import SHORT

ARGS = SimpleNamespace(device=torch.device("cpu"))


def state(step=0, tokens=0, total=10):
    return SimpleNamespace(
        global_step=step, max_steps=total, num_input_tokens_seen=tokens, is_world_process_zero=True, log_history=[]
    )


def one_step(callback, step, tokens, logs=None, seconds=0.01):
    callback.on_step_begin(None, state(step - 1), None)
    time.sleep(seconds)
    callback.on_step_end(None, state(step, tokens), None)
    if logs is not None:
        callback.on_log(ARGS, state(step, tokens), None, logs=logs)


def test_a_row_per_log_event_with_time_and_tokens_since_the_last(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.on_train_begin(ARGS, state(), None)
    one_step(writer, 1, 100)
    one_step(
        writer, 2, 250, {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3, "celora/refreshes": 1, "num_tokens": 9}
    )
    one_step(writer, 3, 300, {"loss": float("nan")}, seconds=0.03)
    writer.on_log(ARGS, state(3, 300), None, logs={"eval_loss": 1.5, "eval_num_tokens": 4})
    writer.on_log(ARGS, state(3, 300), None, logs={"train_runtime": 3.0, "train_loss": 2.0})
    first, second, evaluation = read_metrics(tmp_path / "metrics.jsonl")
    assert (first["step"], first["tokens_seen"], first["celora/refreshes"], first["loss"]) == (2, 250, 1, 2.0)
    assert "num_tokens" not in first
    assert first["step_time_ms"] >= 10
    assert first["tokens_per_second"] == pytest.approx(250 / (2e-3 * first["step_time_ms"]), rel=0.01)
    assert second["loss"] is None
    assert second["step_time_ms"] >= 30
    assert second["tokens_per_second"] == pytest.approx(50 / (1e-3 * second["step_time_ms"]), rel=0.01)
    assert evaluation["eval_loss"] == 1.5
    assert "step_time_ms" not in evaluation
    assert first["seconds"] <= second["seconds"] <= evaluation["seconds"]


def test_resume_drops_later_rows_and_a_torn_line_and_goes_on_counting(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "seconds": 1}\n{"step": 3, "seconds": 2}\n{"step": 4, "seconds": 3}\n{"step"')
    writer = MetricsWriter(path, after_step=3, seconds=100.0)
    writer.on_train_begin(ARGS, state(3, 1000), None)
    one_step(writer, 4, 1100, {"loss": 1.0})
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 3, 4]
    assert rows[-1]["seconds"] > 100
    assert rows[-1]["tokens_seen"] == 1100
    assert rows[-1]["tokens_per_second"] < 100 / 0.01


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems keep the peak of a process for good")
def test_the_peak_of_a_run_is_its_own(tmp_path):
    """Runs in a new process that keeps freed memory. What was there before the run does not count."""
    script = f"""
from pathlib import Path
import torch
from celora.machine.allocator import keep_freed_memory
from celora.train import progress
from test_progress import ARGS, one_step, read_metrics, state, MetricsWriter
keep_freed_memory()
blocks = [torch.ones(2**18) for _ in range(512)]
kept = torch.ones(1)  # above them
del blocks
writer = MetricsWriter(Path({str(tmp_path / "metrics.jsonl")!r}))
before = progress.peak_memory(ARGS.device)
writer.on_train_begin(ARGS, state(), None)
one_step(writer, 1, 100, {{"loss": 2.0}})
(row,) = read_metrics(writer.path)
assert 2**20 * row["peak_memory_mib"] < before - 2**28, (row, before)
"""
    done = run(code, script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_step_loss_and_speed(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    line = ProgressLine(console)
    line.on_train_begin(None, state(total=2), None)
    for step in (1, 2):
        line.on_step_begin(None, state(step - 1, total=2), None)
        line.on_step_end(None, state(step, 100 * step, total=2), None)
        line.on_log(None, state(step, 100 * step, total=2), None, logs={"loss": 1.25})
    line.on_train_end(None, state(2, total=2), None)
    line.close()
    text = console.file.getvalue()
    assert "2/2" in text
    assert "1.2500" in text
    assert "tokens/s" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_tells_the_time_left(terminal, monkeypatch):
    """A resumed run takes the time from its own steps, however long they take."""
    now = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now))
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
    line = ProgressLine(console)
    line.on_train_begin(None, state(3), None)
    for step, seconds in ((4, 40), (5, 50)):
        line.on_step_begin(None, state(step - 1), None)
        now += seconds
        line.on_step_end(None, state(step), None)
    line.close()
    assert "5/10" in console.file.getvalue()
    assert "3.8 min left" in console.file.getvalue()  # five steps of 45 seconds


def test_quiet_prints_nothing():
    console = Console(file=io.StringIO())
    line = ProgressLine(console, quiet=True)
    line.on_train_begin(None, state(total=1), None)
    one_step(line, 10, 5, {"loss": 1.0}, seconds=0)
    assert console.file.getvalue() == ""


def test_without_a_stderr_nothing_is_shown(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    say(progress_console(), False, "nobody sees this")


class Full(io.StringIO):
    """A log on a full disk, or a terminal that was closed."""

    def isatty(self):
        return self.terminal

    def write(self, text=""):
        raise OSError(errno.ENOSPC, "no space left on device")

    flush = write


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="this system has no timer that interrupts")
def test_a_handler_of_a_signal_loses_its_line_while_another_is_written(monkeypatch):
    """As where whatever reads the lines has stopped reading, and Ctrl-C comes."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)

    def handler(*_):
        say(progress_console(), False, "stopping")
        with contextlib.suppress(BlockingIOError):  # nothing is in the pipe yet
            heard.append(len(os.read(reader, 10**6)))

    heard: list[int] = []
    before = signal.signal(signal.SIGALRM, handler)
    with open(writer, "w") as log:
        monkeypatch.setattr(sys, "stderr", log)
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
        try:
            while len(heard) < 2:  # a pipe holds some 64 KiB
                say(progress_console(), False, "a line " * 5_000)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    os.close(reader)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_line_that_cannot_be_written_ends_no_run(terminal, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    monkeypatch.setattr(Full, "terminal", terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", Full())
    result = train(parse([], {**inputs, **SHORT, "output": str(tmp_path / "out")}))
    assert result.status == "finished"
