"""Shows a run while it trains: its moves in run.json, a report every half minute, and the table of `celora watch`.

The training process writes. `celora watch` only reads run.json and metrics.jsonl, from any process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from celora.errors import CELoraError
from celora.files import write_json
from celora.runtime.attachment import require
from celora.train.charts import is_number
from celora.train.output.folder import METRICS, REPORT, RUN, OutputFolder
from celora.train.progress import read_metrics
from celora.train.report import EVERY_S, write_report
from celora.train.wall_clock import WallClock

_BARS, _PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.-=*#"
_RECENT = 20  # speed and time left are taken from so many log events


class LiveReport(TrainerCallback):  # type: ignore[misc]
    """Writes run.json and the report while a run trains.

    run.json is written when training begins, and after a step that moved a layer. The report is written after a log
    event, every `EVERY_S` seconds.

    Args:
        folder: the output folder.
        name: what the run is called in its report.
        record: the content of run.json. It gets the number of steps, and the moves.
        clock: it is told how long the report took.
    """

    def __init__(self, folder: Path, name: str, record: dict[str, Any], clock: WallClock) -> None:
        self.folder, self.name, self.record, self.clock = folder, name, record, clock
        self._written = time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Also called again with a smaller batch (`auto_find_batch_size`), which makes more steps."""
        self.record["steps"] = state.max_steps
        self._save()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any, **_: Any
    ) -> None:
        moves = require(model).ladder.moves
        if len(moves) != len(self.record.get("moves", ())):
            self.record["moves"] = [asdict(move) for move in moves]
            self._save()

    def _save(self) -> None:
        with suppress(CELoraError):  # the disk may be full for a moment; the end of the run would say so
            write_json(self.folder / RUN, self.record)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if time.monotonic() - self._written < EVERY_S:
            return
        with suppress(CELoraError), self.clock.spending("report"):
            write_report(self.folder / REPORT, {self.name: self.folder})
        self._written = time.monotonic()


@dataclass(frozen=True)
class Snapshot:
    """The state of a run. A number that is not known yet is None.

    Attributes:
        status: the status in run.json; "stopped" for a run that was killed.
        step, steps: optimizer steps so far, and in all.
        losses: the training losses logged so far.
        eval_loss, eval_base_loss: the latest on held-out rows, as trained and on the original base.
        tokens_per_second: recent speed, without padding.
        seconds_left: seconds of training that are left, at the recent speed.
        relative_error: error of the estimates, the mean over layers at the latest refresh.
    """

    name: str
    status: str
    step: int
    steps: int | None
    losses: tuple[float, ...]
    eval_loss: float | None
    eval_base_loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    peak_memory_mib: float | None
    relative_error: float | None

    @property
    def goes_on(self) -> bool:
        return self.status == "running"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with only the latest loss."""
        found = asdict(self)
        losses = found.pop("losses")
        return found | {"loss": losses[-1] if losses else None}


def look(folder: Path) -> Snapshot:
    """Read the state of the run in `folder`.

    Raises:
        CELoraError: no run has used the folder, or its record is damaged.
    """
    output = OutputFolder(folder)
    record = output.run()
    if record is None:
        raise CELoraError(f"there is no run in {str(folder)!r}; give the --output folder of celora train")
    rows = read_metrics(folder / METRICS)
    status = str(record.get("status", ""))
    if status == "running" and not output.in_use():
        status = "stopped"
    step, steps = int(rows[-1]["step"]) if rows else 0, record.get("steps")
    steps = int(steps) if is_number(steps) else None  # whatever somebody made of it by hand
    timed = [row for row in rows if "loss" in row][-_RECENT:]
    left = None
    if status == "running" and steps is not None and len(timed) > 1 and timed[-1]["step"] > timed[0]["step"]:
        speed = (timed[-1]["seconds"] - timed[0]["seconds"]) / (timed[-1]["step"] - timed[0]["step"])
        left = speed * max(0, steps - step)
    speeds = [row["tokens_per_second"] for row in timed if row.get("tokens_per_second")]
    return Snapshot(
        name=str(folder),
        status=status,
        step=step,
        steps=steps,
        losses=tuple(float(row["loss"]) for row in rows if row.get("loss") is not None),
        eval_loss=_latest(rows, "eval_loss"),
        eval_base_loss=_latest(rows, "eval_base_loss"),
        tokens_per_second=statistics.median(speeds) if speeds else None,
        seconds_left=left,
        peak_memory_mib=_latest(rows, "peak_memory_mib"),
        relative_error=_latest(rows, "celora/relative_error"),
    )


def _latest(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return next((float(row[key]) for row in reversed(rows) if row.get(key) is not None), None)


def sparkline(values: Sequence[float], *, width: int = 24, plain: bool = False) -> str:
    """A curve of `values` in at most `width` characters, each the mean of an equal part. `plain`: in ASCII."""
    bars = _PLAIN_BARS if plain else _BARS
    count = min(width, len(values))
    means = [statistics.fmean(values[i * len(values) // count : (i + 1) * len(values) // count]) for i in range(count)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((value - low) * scale)] for value in means)


def show(snapshots: Sequence[Snapshot], *, plain: bool = False) -> Table:
    """A table with a column for each run, for the terminal."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for snapshot in snapshots:
        table.add_column(snapshot.name, overflow="fold")
    lines: list[tuple[str, list[str]]] = [
        ("status", [one.status for one in snapshots]),
        ("step", [f"{one.step}" if one.steps is None else f"{one.step}/{one.steps}" for one in snapshots]),
        ("loss", [f"{one.losses[-1]:.4f}" if one.losses else "" for one in snapshots]),
        ("", [sparkline(one.losses, plain=plain) for one in snapshots]),
        ("evaluation loss", [_text(one.eval_loss, ".4f") for one in snapshots]),
        ("the same on the original base", [_text(one.eval_base_loss, ".4f") for one in snapshots]),
        ("tokens/s", [_text(one.tokens_per_second, ",.0f") for one in snapshots]),
        ("time left", [_minutes(one.seconds_left) for one in snapshots]),
        ("peak memory, MiB", [_text(one.peak_memory_mib, ",.0f") for one in snapshots]),
        ("error of estimates", [_text(one.relative_error, ".3f") for one in snapshots]),
    ]
    for label, cells in lines:
        if any(cells):
            table.add_row(label, *cells)
    return table


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _minutes(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds / 60:.1f} min"
