"""The demo: a real small model, real data, LoRA and CE-LoRA from the same seeds, judged on sentences neither has seen.

For each seed both contenders train on the same rows in the same order. Each adapter is then scored by stock PEFT
in a process that never imports celora (`stock_eval.py`); for CE-LoRA that score must equal the one of the model as
it stands in memory after training, or the demo fails.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from celora.errors import CELoraError
from celora.files import write_text
from celora.machine.allocator import keep_freed_memory
from celora.machine.timing import faster_dtype
from celora.studies import stock_eval
from celora.studies.assets import Review, demo_model
from celora.studies.sentiment import splits, to_rows
from celora.train.output.folder import OutputFolder, write_json, writing_to
from celora.train.progress import read_metrics
from celora.train.report import write_report
from celora.train.request.arguments import make_request
from celora.train.run import train

ROWS = "demo.jsonl"
MARKER = ".celora-demo"
ARMS = {"LoRA": "off", "CE-LoRA": "paper"}
LEARNING_RATES = {"LoRA": 1e-3, "CE-LoRA": 1e-3}
REFRESH_EVERY = 12  # the published 200 would refresh once in so short a run, before the adapter has learnt anything


@dataclass(frozen=True)
class DemoRow:
    """One contender's result with one seed; a line of `demo.jsonl`.

    Attributes:
        accuracy: on the held-out sentences, scored by stock PEFT in a separate process; without adapter if untouched.
        step_time_ms: median over the optimizer steps that neither warm up nor refresh, or None.
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
    steps: int = 120,
    batch_size: int = 8,
    held_out: int = 600,
    validation: int = 600,
    learning_rates: Mapping[str, float] = LEARNING_RATES,
    refresh_every: int = REFRESH_EVERY,
    judge: Literal["test", "validation"] = "test",
    arms: Sequence[str] = tuple(ARMS),
    console: Console | None = None,
    quiet: bool = False,
) -> list[DemoRow]:
    """Run the demo into `output` (made, or taken over from an earlier demo); its rows, progress on `console`.

    `judge` names the sentences that score: choices about the demo are made on the `validation` ones, its results come
    from the `held_out` others ("test"). Training sees neither.
    Writes the runs (`lora-seed0`, `ce-lora-seed0`, ...), `report.html` with both loss curves, and `demo.jsonl`.

    Raises:
        CELoraError: `output` holds something else, the model or data cannot be had, or an adapter does not score
            under stock PEFT as it did after training.
    """
    console = console or Console(stderr=True, highlight=False)
    begun = time.perf_counter()

    def say(line: str) -> None:
        if not quiet:
            console.print(line, soft_wrap=True, markup=False)

    OutputFolder(output).check_writable()
    with writing_to(output):
        if output.exists() and any(output.iterdir()) and not (output / MARKER).is_file():
            raise CELoraError(f"{output} is not empty and holds no demo; choose another folder with --output.")
    keep_freed_memory()
    model = demo_model(say)
    held: list[Review] = getattr(splits(0, validation=validation, test=held_out, say=say), judge)
    judged = output / "data" / f"{judge}.jsonl"
    with writing_to(output):
        judged.parent.mkdir(parents=True, exist_ok=True)
    write_text(output / MARKER, "This folder was made by celora demo, which may replace what it holds.\n")
    _write_rows(judged, to_rows(held))
    dtype = faster_dtype()

    say(
        f"Scoring the untouched model on {len(held)} held-out sentences "
        f"({dtype}, {torch.get_num_threads()} threads) ..."
    )
    accuracy = stock_accuracy(model, judged, dtype)
    rows = [DemoRow("untouched", 0, accuracy, len(held), 0, 0, None, 0.0, 0.0, *_machine(dtype))]
    say(f"  {accuracy:.1%} right")

    shared = shared_settings(model, steps, batch_size, dtype) | {
        "celora": {"refresh_every": refresh_every},
        "quiet": quiet,
    }
    for seed in range(seeds):
        training = splits(seed, train=steps * batch_size, validation=validation, test=held_out).train
        data = output / "data" / f"train-seed{seed}.jsonl"
        _write_rows(data, to_rows(training))
        # Whoever goes second finds a warmer, or a busier, machine: take turns.
        for arm in arms if seed % 2 == 0 else reversed(arms):
            say(f"Training {arm}, seed {seed}: {steps} steps of {batch_size} sentences ...")
            own = {
                "preset": ARMS[arm],
                "learning_rate": learning_rates[arm],
                "seed": seed,
                "data": str(data),
                "output": str(_folder(output, arm, seed)),
            }
            rows.append(_contend(arm, shared | own, judged, console))
            say(f"  {rows[-1].accuracy:.1%} right, {rows[-1].step_time_ms or 0:.0f} ms per step")
    _write_rows(output / ROWS, [asdict(row) for row in rows])
    runs = {f"{row.arm}, seed {row.seed}": _folder(output, row.arm, row.seed) for row in rows[1:]}
    write_report(
        output / "report.html",
        runs,
        title="celora demo: sentiment of movie reviews",
        results={
            "held-out accuracy": {f"{row.arm}, seed {row.seed}": f"{row.accuracy:.1%}" for row in rows[1:]},
            "held-out accuracy of the untouched model": dict.fromkeys(runs, f"{accuracy:.1%}"),
            "time per step, ms (median)": {f"{row.arm}, seed {row.seed}": row.step_time_ms for row in rows[1:]},
        },
        repeats={f"{row.arm}, seed {row.seed}": row.arm for row in rows[1:]},
    )
    say(f"{(time.perf_counter() - begun) / 60:.1f} minutes.")
    return rows


def shared_settings(model: Path, steps: int, batch_size: int, dtype: str) -> dict[str, Any]:
    """What all contenders of the demo have in common: names and values as `make_request` takes them."""
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


def summary(rows: Sequence[DemoRow]) -> list[tuple[str, str, str, str]]:
    """The cells of the result table, as text; the README's table is made of the same."""
    cells = []
    for arm in dict.fromkeys(row.arm for row in rows):
        of = [row for row in rows if row.arm == arm]
        accuracies = [row.accuracy for row in of]
        spread = f" ({min(accuracies):.1%} to {max(accuracies):.1%})" if len(of) > 1 else ""
        times = [row.step_time_ms for row in of if row.step_time_ms is not None]
        cells.append(
            (
                arm,
                f"{statistics.mean(accuracies):.1%}{spread}",
                f"{statistics.median(times):.0f} ms" if times else "",
                f"{of[0].cost:.2f}" if times else "",
            )
        )
    return cells


def _contend(arm: str, settings: dict[str, Any], judged: Path, console: Console) -> DemoRow:
    model, folder = Path(settings["model"]), Path(settings["output"])
    request = make_request(settings | {"overwrite": folder.exists()})
    result = train(request, console=console)
    if result.status != "finished":
        raise KeyboardInterrupt
    accuracy = stock_accuracy(model, judged, settings["dtype"], adapter=folder)
    if arm != "LoRA":
        in_memory = _in_memory_accuracy(result.model, model, judged)
        if in_memory != accuracy:
            raise CELoraError(
                f"the adapter in {folder} scores {accuracy:.4f} under stock PEFT but {in_memory:.4f} in memory."
            )
    row = DemoRow(
        arm,
        settings["seed"],
        accuracy,
        len(_read_rows(judged)),
        result.step,
        request.r,
        _median_step_time(folder, request.config.refresh_every),
        result.summary["seconds"],
        result.summary["estimated_cost"],
        *_machine(settings["dtype"]),
    )
    write_json(folder / "demo.json", asdict(row))
    return row


def _median_step_time(folder: Path, refresh_every: int) -> float | None:
    """Of the steps after the first two, which allocate and compile, and which for CE-LoRA is where it refreshes."""
    times = [row["step_time_ms"] for row in read_metrics(folder / "metrics.jsonl") if "step_time_ms" in row]
    usual = [ms for step, ms in enumerate(times) if step >= 2 and step % refresh_every]
    return round(statistics.median(usual), 1) if usual else None


def stock_accuracy(model: Path, data: Path, dtype: str, *, adapter: Path | None = None) -> float:
    """The share of right answers to the rows in `data`, of a stock process that must not have imported celora.

    Raises CELoraError if it fails, or has imported celora.
    """
    command = [sys.executable, stock_eval.__file__, "--base", str(model), "--data", str(data), "--dtype", dtype]
    if adapter is not None:
        command += ["--adapter", str(adapter)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "no output").splitlines()[-1]
        raise CELoraError(f"scoring {adapter or model} with stock PEFT failed: {reason}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if answer["celora_imported"]:
        raise CELoraError("the process that scores with stock PEFT imported celora; its result would prove nothing.")
    return float(answer["accuracy"])


def _in_memory_accuracy(trained: Any, model: Path, data: Path) -> float:
    from transformers import AutoTokenizer

    return stock_eval.label_accuracy(
        trained, AutoTokenizer.from_pretrained(model, trust_remote_code=False), _read_rows(data)
    )


def _read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _folder(output: Path, arm: str, seed: int) -> Path:
    return output / f"{arm.lower()}-seed{seed}"


def _machine(dtype: str) -> tuple[int, str, str]:
    return torch.get_num_threads(), dtype, torch.__version__
