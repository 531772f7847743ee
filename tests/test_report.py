"""The report is one file that fetches nothing, and no text from data can leave its place."""

from __future__ import annotations

import json
import re

from celora.train.folder import write_json
from celora.train.report import MAX_POINTS, PALETTE, write_report

ROWS = [
    {"step": i, "seconds": 0.5 * i, "loss": 4.0 / i, "step_time_ms": 10.0, "celora/relative_error": 0.3}
    for i in range(1, 9)
]


def charts(page: str) -> list[dict]:
    return json.loads(re.search(r"<script type=\"application/json\" id=charts>(.*?)</script>", page, re.S)[1])


def test_charts_have_units_one_line_and_colour_per_run(tmp_path):
    write_report(tmp_path / "r.html", {"LoRA": ROWS, "celora": ROWS[:4]})
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    drawn = {chart["title"]: chart for chart in charts(page)}
    loss = drawn["Training loss by time"]
    assert (loss["x"], loss["y"]) == ("wall-clock, s", "loss, nats per token")
    assert [line["name"] for line in loss["lines"]] == ["LoRA", "celora"]
    assert [line["line"]["color"] for line in loss["lines"]] == list(PALETTE[:2])
    assert loss["lines"][0]["x"] == [row["seconds"] for row in ROWS]
    assert "Relative error of the estimate at the latest refresh" in drawn
    assert "Evaluation loss" not in drawn


def test_self_contained_responsive_and_dark(tmp_path):
    write_report(tmp_path / "r.html", {"run": ROWS})
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("Plotly.react(") == 1
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=", page)
    assert "prefers-color-scheme: dark" in page
    assert "name=viewport" in page


def test_text_from_data_is_escaped(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x>"
    run = tmp_path / "run"
    run.mkdir()
    write_json(run / "run.json", {"celora": "0", "given": {"model": evil, evil: 1}, "versions": {"torch": evil}})
    (run / "metrics.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    write_report(tmp_path / "r.html", {evil: run}, title=evil)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "<img" not in re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    assert charts(page)[0]["lines"][0]["name"].startswith("&lt;/script")


def test_no_rows_long_runs_and_values_that_are_not_numbers(tmp_path):
    write_report(tmp_path / "empty.html", {"run": []})
    assert charts((tmp_path / "empty.html").read_text(encoding="utf-8")) == []
    many = [{"step": i, "seconds": i, "loss": None if i == 3 else float(i)} for i in range(3 * MAX_POINTS)]
    write_report(tmp_path / "long.html", {"run": many})
    line = charts((tmp_path / "long.html").read_text(encoding="utf-8"))[0]["lines"][0]
    assert len(line["x"]) <= MAX_POINTS
    assert None not in line["y"]
