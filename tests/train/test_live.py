"""What a user sees of a run while it trains: its report, and the table of `celora watch`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

import celora
from celora import CELoraError
from celora.files import read_json, write_json
from celora.runtime.attachment import require
from celora.runtime.ladder import Move
from celora.train import live
from celora.train.live import LiveReport, look, show, sparkline
from celora.train.output.folder import OutputFolder
from celora.train.wall_clock import WallClock
from reports import ROWS, run_folder
from small import make_model


def going_on(folder: Path, name: str = "run", *, steps: object = None) -> Path:
    """A run whose record says that it is running, although its folder is not locked."""
    run = run_folder(folder, name)
    write_json(run / "run.json", read_json(run / "run.json") | {"status": "running", "steps": steps})
    return run


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    run = going_on(tmp_path, steps=20)
    with OutputFolder(run).locked():
        seen = look(run)
    assert (seen.status, seen.step, seen.steps) == ("running", 8, 20)
    assert seen.goes_on
    assert seen.losses == tuple(row["loss"] for row in ROWS)
    assert seen.seconds_left == pytest.approx(0.5 * 12)
    assert (seen.peak_memory_mib, seen.relative_error, seen.eval_loss) == (500.0, 0.3, None)
    assert seen.to_dict()["loss"] == ROWS[-1]["loss"]
    json.dumps(seen.to_dict(), allow_nan=False)


def test_a_run_that_was_killed_has_stopped(tmp_path: Path) -> None:
    seen = look(going_on(tmp_path, steps=20))
    assert (seen.status, seen.goes_on, seen.seconds_left) == ("stopped", False, None)


@pytest.mark.parametrize("steps", [None, "x", [1], True])
def test_the_length_of_a_run_is_unknown_if_somebody_damaged_its_record(steps: object, tmp_path: Path) -> None:
    run = going_on(tmp_path, steps=steps)
    assert look(run).steps is None


def test_a_run_that_has_logged_nothing(tmp_path: Path) -> None:
    run = going_on(tmp_path, steps=20)
    (run / "metrics.jsonl").unlink()
    with OutputFolder(run).locked():
        seen = look(run)
    assert (seen.step, seen.losses, seen.seconds_left) == (0, (), None)
    assert "0/20" in shown(seen)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CELoraError, match=r"there is no run in .*; give the --output folder"):
        look(tmp_path)


def shown(*snapshots: live.Snapshot, plain: bool = False) -> str:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(show(snapshots, plain=plain))
    return captured.get()


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    first, second = (look(going_on(tmp_path, name, steps=20)) for name in ("first", "second"))
    text = shown(first, second)
    assert text.count("8/20") == 2
    assert text.count("0.5000") == 2
    assert text.count("█") == 2
    assert "evaluation loss" not in text  # no run has one
    shown(first, plain=True).encode("ascii")


def test_both_losses_of_an_evaluation_are_shown(tmp_path: Path) -> None:
    run = going_on(tmp_path, steps=20)
    rows = [*ROWS, {"step": 8, "seconds": 4.5, "eval_loss": 2.5, "eval_base_loss": 2.25}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    seen = look(run)
    assert (seen.eval_loss, seen.to_dict()["eval_base_loss"]) == (2.5, 2.25)
    text = shown(seen)
    assert re.search(r"evaluation loss +2\.5000 *\n *the same on the original base +2\.2500", text)


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [([], 4, ""), ([2.0], 4, "▁"), ([0.0, 7.0, 3.0], 9, "▁█▄"), ([0, 2, 6, 8], 2, "▁█"), ([5.0, 5.0], 4, "▁▁")],
)
def test_a_sparkline(values: list[float], width: int, expected: str) -> None:
    assert sparkline(values, width=width) == expected


@pytest.mark.filterwarnings("ignore:celora. (at step|from step)")
def test_moves_are_in_the_record_while_the_run_goes_on(tmp_path: Path) -> None:
    run, model = going_on(tmp_path), make_model()
    celora.attach(model, "exact")
    record = read_json(run / "run.json")
    callback = LiveReport(run, "auto", record, WallClock())
    callback.on_step_end(None, TrainerState(), TrainerControl(), model=model)
    assert "moves" not in read_json(run / "run.json")
    for step in (1, 1, 3):
        require(model).ladder.moves.append(Move(step, f"layer{step}", 0.9997, 1.0, 0.06))
        callback.on_step_end(None, TrainerState(), TrainerControl(), model=model)
        moves = read_json(run / "run.json")["moves"]
        assert [Move(**move) for move in moves] == require(model).ladder.moves
    assert read_json(run / "run.json") == record


def test_the_report_is_written_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, now = going_on(tmp_path, steps=20), [0.0]
    monkeypatch.setattr("celora.train.live.time.monotonic", lambda: now[0])
    callback = LiveReport(run, "auto", {}, WallClock())
    report = run / "report.html"
    for seconds, there in ((29.0, False), (31.0, True)):
        now[0] = seconds
        callback.on_log(None, TrainerState(), TrainerControl())
        assert report.exists() is there
    page = report.read_text(encoding="utf-8")
    assert "<meta http-equiv=refresh content=30>" in page
    assert "auto goes on; this page loads itself anew" in page
    assert "last training loss" in page
    report.unlink()
    now[0] = 60.0
    callback.on_log(None, TrainerState(), TrainerControl())
    assert not report.exists()  # 29 s after the last report
    write_json(run / "run.json", read_json(run / "run.json") | {"status": "finished"})
    now[0] = 90.0
    callback.on_log(None, TrainerState(), TrainerControl())
    assert "http-equiv=refresh" not in report.read_text(encoding="utf-8")
