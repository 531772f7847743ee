"""`celora demo`: trains an adapter in three ways, on a real small model and real data.

LoRA, CE-LoRA as published, and celora's default see the same rows in the same order. Stock PEFT then scores each
adapter on sentences that no training has seen, in a process that never imports celora (`stock_eval.py`). The score must
equal that of the trained model in memory, or the demo fails. Step times are measured in turns.
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from celora.errors import CELoraError
from celora.files import json_lines, write_json, write_text
from celora.machine.timing import faster_dtype
from celora.studies import stock_eval
from celora.studies.assets import demo_gguf, demo_model
from celora.studies.cells import training_batches
from celora.studies.sentiment import SYSTEM, splits, to_rows
from celora.studies.step import Step, take_turns
from celora.train import progress
from celora.train.loading import quiet_libraries
from celora.train.output.folder import OutputFolder, writing_to
from celora.train.record import TrainResult
from celora.train.report import write_report
from celora.train.request.arguments import make_request
from celora.train.run import train

ROWS = "demo.jsonl"
MARKER = ".celora-demo"
ARMS = {"LoRA": "off", "CE-LoRA": "paper", "auto": "auto"}
SHOWN = {"CE-LoRA": "CE-LoRA as published (paper)", "auto": "celora's default (auto)"}
LEARNING_RATE = 1e-3
REFRESH_EVERY = 12  # with the published 200 there would be one refresh, at the start, when lora_B is zero
STEPS = 40
VALIDATION = 600  # sentences that the choices above were made on; neither training nor results see them
ASKED = "A dull and lifeless film. Sentiment:"
WARM_UP, TIMED = 2, 6  # steps of each arm when they are timed; the warm-up allocates and compiles


@dataclass(frozen=True)
class DemoRow:
    """The result of one arm with one seed; a line of `demo.jsonl`.

    Attributes:
        accuracy: share of held-out sentences with the right label, scored by stock PEFT in a separate process. Arm
            `untouched` is the base model without an adapter.
        step_time_ms: median of training steps, timed in turns with the other arms'; None for `untouched`.
        cost: FLOPs of the frozen `grad_input` products relative to exact LoRA.
    """

    arm: str
    seed: int
    accuracy: float
    held_out: int
    steps: int
    rank: int
    step_time_ms: float | None
    train_seconds: float
    cost: float
    threads: int
    dtype: str
    torch: str


def run_demo(
    output: Path,
    *,
    seeds: int = 1,
    steps: int = STEPS,
    batch_size: int = 8,
    held_out: int = 300,
    console: Console | None = None,
    quiet: bool = False,
) -> list[DemoRow]:
    """Run the demo and return its rows.

    `output` is a new folder or that of an earlier demo. It gets the runs (`lora-seed0`, `ce-lora-seed0`, ...),
    `report.html` with all loss curves, and `demo.jsonl`. Progress goes to `console`.

    `held_out` sentences, which training does not see, score the adapters.

    Raises:
        CELoraError: `output` has other files, model or data cannot be fetched, or an adapter scores differently under
            stock PEFT than it did in memory.
    """
    console = console or progress.progress_console()
    begun = time.perf_counter()
    say = functools.partial(progress.say, console, quiet)
    _claim(output)
    study = _Study(output, demo_model(say), output / "data" / "test.jsonl", faster_dtype(), console, quiet)
    drawn = functools.partial(splits, validation=VALIDATION, test=held_out, say=say)
    write_text(study.judged, json_lines(to_rows(drawn(0).test)))

    rows: list[DemoRow] = []
    shared = shared_settings(study.model, steps, batch_size, study.dtype) | {"quiet": quiet}
    for seed in range(seeds):
        data = output / "data" / f"train-seed{seed}.jsonl"
        write_text(data, json_lines(to_rows(drawn(seed, train=steps * batch_size).train)))
        own = {
            arm: shared
            | {"preset": preset, "learning_rate": LEARNING_RATE, "seed": seed, "data": str(data)}
            | {"output": str(_folder(output, arm, seed))}
            | ({} if preset != "paper" else {"celora": {"refresh_every": REFRESH_EVERY}})
            for arm, preset in ARMS.items()
        }
        rows += _contend(study, seed, own, untouched=seed == 0)
    write_text(output / ROWS, json_lines(map(asdict, rows)))
    _report(output, rows)
    say(f"{(time.perf_counter() - begun) / 60:.1f} minutes.")
    return rows


@dataclass(frozen=True)
class _Study:
    """What all runs of a demo have in common."""

    output: Path
    model: Path
    judged: Path  # the held-out rows that score
    dtype: str
    console: Console
    quiet: bool

    def say(self, line: str) -> None:
        progress.say(self.console, self.quiet, line)

    def row(self, arm: str, seed: int, accuracy: float, **found: Any) -> DemoRow:
        """The row of one arm with one seed."""
        none = {"steps": 0, "rank": 0, "step_time_ms": None, "train_seconds": 0.0, "cost": 0.0}
        machine = {"threads": torch.get_num_threads(), "dtype": self.dtype, "torch": torch.__version__}
        return DemoRow(arm, seed, accuracy, len(_read_rows(self.judged)), **(none | found | machine))


def _claim(output: Path) -> None:
    """Mark the folder as a demo's, or refuse one with other files."""
    OutputFolder(output).check_writable()
    with writing_to(output):
        if output.exists() and any(output.iterdir()) and not (output / MARKER).is_file():
            raise CELoraError(f"{output} is not empty and holds no demo; choose another folder with --output.")
        (output / "data").mkdir(parents=True, exist_ok=True)
    write_text(output / MARKER, "This folder was made by celora demo, which may replace what it holds.\n")


def _contend(study: _Study, seed: int, own: Mapping[str, dict[str, Any]], *, untouched: bool) -> list[DemoRow]:
    """Train all arms with one seed, score their adapters with stock PEFT, and time their steps in turns."""
    results: dict[str, TrainResult] = {}
    in_memory: dict[str, float] = {}
    # Every second seed has the arms in reverse: later arms may find a warmer, or busier, machine.
    for arm in own if seed % 2 == 0 else reversed(list(own)):
        steps, batch = own[arm]["max_steps"], own[arm]["per_device_train_batch_size"]
        study.say(f"Training {SHOWN.get(arm, arm)}, seed {seed}: {steps} steps of {batch} sentences ...")
        results[arm] = _trained(own[arm], study.console)
        if arm != "LoRA":
            in_memory[arm] = _in_memory_accuracy(results[arm].model, study.model, study.judged)
    study.say(f"Scoring the adapters on {len(_read_rows(study.judged))} held-out sentences, with stock PEFT ...")
    folders = [results[arm].output for arm in own]
    scores = stock_accuracies(study.model, study.judged, study.dtype, adapters=folders, untouched=untouched)
    rows = [study.row("untouched", seed, scores.pop(0))] if untouched else []
    accuracies = dict(zip(own, scores, strict=True))
    for arm, accuracy in in_memory.items():
        if accuracy != accuracies[arm]:
            raise CELoraError(
                f"the adapter in {results[arm].output} scores {accuracies[arm]:.4f} under stock PEFT but "
                f"{accuracy:.4f} in memory."
            )
    study.say("Timing their steps in turns ...")
    times = _times_in_turns({arm: results[arm].model for arm in own}, next(iter(own.values())))
    for arm in own:
        result = results[arm]
        found: dict[str, Any] = {"steps": result.step, "rank": make_request(own[arm] | {"overwrite": True}).r}
        found |= {"step_time_ms": times[arm], "train_seconds": result.summary["seconds"]}
        rows.append(study.row(arm, seed, accuracies[arm], cost=result.summary["estimated_cost"], **found))
        write_json(result.output / "demo.json", asdict(rows[-1]))
    return rows


def _trained(settings: dict[str, Any], console: Console) -> TrainResult:
    result = train(make_request(settings | {"overwrite": Path(settings["output"]).exists()}), console=console)
    if result.status != "finished":
        raise KeyboardInterrupt
    return result


def _times_in_turns(models: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, float]:
    """Median milliseconds of a training step of each model, on the same batches. It trains the models further.

    CE-LoRA refreshes in fewer than half of its steps, so the median leaves its refreshes out.
    """
    with quiet_libraries(), tempfile.TemporaryDirectory() as scratch:
        batches = training_batches({**settings, "output": scratch}, WARM_UP)
        turns = take_turns({arm: Step(model, Path(scratch)) for arm, model in models.items()}, batches, TIMED)
    return {arm: round(statistics.median(map(sum, parts)), 1) for arm, parts in turns.items()}


def _report(output: Path, rows: Sequence[DemoRow]) -> None:
    """Write the page with the loss curves of all runs."""
    accuracy, trained = rows[0].accuracy, rows[1:]
    named = {f"{SHOWN.get(row.arm, row.arm)}, seed {row.seed}": row for row in trained}
    write_report(
        output / "report.html",
        {name: _folder(output, row.arm, row.seed) for name, row in named.items()},
        title="celora demo: sentiment of movie reviews",
        results={
            "held-out accuracy": {name: f"{row.accuracy:.1%}" for name, row in named.items()},
            "held-out accuracy of the untouched model": dict.fromkeys(named, f"{accuracy:.1%}"),
            "time per step, ms (median, in turns)": {name: row.step_time_ms for name, row in named.items()},
        },
        repeats={name: SHOWN.get(row.arm, row.arm) for name, row in named.items()},
    )


def shared_settings(model: Path, steps: int, batch_size: int, dtype: str) -> dict[str, Any]:
    """The settings that all arms share, for `make_request`."""
    return {
        "model": str(model),
        "dtype": dtype,
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "warmup_steps": steps // 10,
        "lora_r": 16,
        "lora_alpha": 32,
        "save_strategy": "no",
        "train_sampling_strategy": "group_by_length",  # less padding, fewer wasted steps
    }


def result_table(rows: Sequence[DemoRow]) -> Table:
    """Accuracy (mean, and range over seeds), time per step and backward cost of each arm."""
    table = Table(title="Sentiment of movie reviews, SmolLM2-135M-Instruct (weights unpacked from 4 bits)")
    for column in ("", "held-out accuracy", "time per step", "frozen backward, FLOPs"):
        table.add_column(column, justify="left" if not column else "right")
    for cells in summary(rows):
        table.add_row(*cells)
    return table


def whole_way(output: Path) -> list[str]:
    """The commands from the demo's GGUF file to an adapter for llama.cpp, within 2 GiB, on the data of this demo."""
    given = f"--model {demo_gguf()} --data {output / 'data' / 'train-seed0.jsonl'} --memory 2GiB"
    adapter = output / "from-gguf"
    return [
        f"celora estimate {given}",
        f"celora train {given} --output {adapter} --max_steps {STEPS}",
        f'celora chat {adapter} --system "{SYSTEM}" --prompt "{ASKED}" --temperature 0',
        f"celora export {adapter} --to gguf",
    ]


def summary(rows: Sequence[DemoRow]) -> list[tuple[str, str, str, str]]:
    """The cells of the result table, as text. The README's table uses them, too."""
    cells = []
    for arm in dict.fromkeys(row.arm for row in rows):
        its = [row for row in rows if row.arm == arm]
        accuracies = [row.accuracy for row in its]
        spread = f" ({min(accuracies):.1%} to {max(accuracies):.1%})" if len(its) > 1 else ""
        times = [row.step_time_ms for row in its if row.step_time_ms is not None]
        cells.append(
            (
                SHOWN.get(arm, arm),
                f"{statistics.mean(accuracies):.1%}{spread}",
                f"{statistics.median(times):.0f} ms" if times else "",
                f"{its[0].cost:.2f}" if times else "",
            )
        )
    return cells


def stock_accuracies(
    model: Path, data: Path, dtype: str, *, adapters: Sequence[Path] = (), untouched: bool = True
) -> list[float]:
    """The share of right answers to the rows in `data`: for the untouched model, if asked for, then for each adapter.

    A separate process with stock PEFT scores them. Raises CELoraError if it fails, or has imported celora.
    """
    command = [sys.executable, stock_eval.__file__, "--base", str(model), "--data", str(data), "--dtype", dtype]
    command += ["--untouched"] * untouched + [part for folder in adapters for part in ("--adapter", str(folder))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "no output").splitlines()[-1]
        raise CELoraError(f"scoring {', '.join(map(str, adapters)) or model} with stock PEFT failed: {reason}")
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if any(answer["celora_imported"] for answer in answers):
        raise CELoraError("the process that scores with stock PEFT imported celora, so its result proves nothing.")
    return [float(answer["accuracy"]) for answer in answers]


def _in_memory_accuracy(trained: Any, model: Path, data: Path) -> float:
    from transformers import AutoTokenizer

    return stock_eval.label_accuracy(
        trained, AutoTokenizer.from_pretrained(model, trust_remote_code=False), _read_rows(data)
    )


def _read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _folder(output: Path, arm: str, seed: int) -> Path:
    return output / f"{arm.lower()}-seed{seed}"
