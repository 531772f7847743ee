"""Where the wall-clock time went: time inside nested parts counts once.

A run's record, report and last lines have it.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress

from celora.train.wall_clock import PARTS, WallClock, spent
from runs import go


def test_no_second_counts_twice(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = WallClock(began=97.0)
    with clock.spending("train"):
        now[0] += 5
        with clock.spending("evaluate"):
            now[0] += 2
            with clock.spending("save"):
                now[0] += 1
        now[0] += 4
    with suppress(KeyError), clock.spending("save"):  # failed work has taken its time, too
        now[0] += 1
        raise KeyError
    summary = clock.summary()
    expected = {"start": 3.0, "load": 0, "tokenise": 0, "choose": 0, "train": 9.0, "evaluate": 2.0, "save": 2.0}
    expected |= {"report": 0, "compare": 0}
    assert spent(summary) == expected
    assert {*summary} == {f"{part}_seconds" for part in PARTS}
    assert spent({"seconds": 3.0}) == {}  # a record of an earlier version


def test_a_run_says_where_its_time_went(inputs, tmp_path):
    began = time.perf_counter()
    go(inputs, tmp_path / "out", eval_data=inputs["data"], eval_strategy="steps", eval_steps=3)
    summary = json.loads((tmp_path / "out" / "run.json").read_text())["summary"]
    parts = spent(summary)
    assert [*parts] == [*PARTS]
    assert all(parts[part] > 0 for part in PARTS if part not in ("start", "compare"))
    assert sum(parts.values()) <= time.perf_counter() - began
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>Wall-clock of the latest call, s</h2>" in page
    assert "<th scope=row>tokenise</th>" in page
    assert "<th scope=row>choose</th>" in page
