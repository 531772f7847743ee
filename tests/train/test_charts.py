"""Charts have units and one colour for each run, and no point is lost."""

from __future__ import annotations

from celora.train.charts import MAX_POINTS, PALETTE
from celora.train.report import write_report
from reports import ROWS, charts


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
    assert "Held-out loss by step" not in drawn


def test_held_out_rows_by_step_and_time(tmp_path):
    rows = [*ROWS, {"step": 8, "seconds": 4.5, "eval_loss": 2.5, "eval_mean_token_accuracy": 0.25}]
    write_report(tmp_path / "r.html", {"run": rows})
    drawn = {chart["title"]: chart for chart in charts((tmp_path / "r.html").read_text(encoding="utf-8"))}
    by_step, by_time = drawn["Held-out loss by step"]["lines"][0], drawn["Held-out loss by time"]["lines"][0]
    assert (by_step["x"], by_step["y"]) == ([8], [2.5])
    assert (by_time["x"], by_time["y"]) == ([4.5], [2.5])
    assert drawn["Held-out token accuracy"]["lines"][0]["y"] == [0.25]


def test_seeds_share_colour_and_legend_entry(tmp_path):
    """A comparison with seeds has more runs than colours. Still, no colour means two things."""
    runs = {f"{arm}, seed {seed}": ROWS for arm in ("LoRA", "paper", "auto") for seed in range(3)}
    write_report(tmp_path / "r.html", runs, repeats={name: name.split(",")[0] for name in runs})
    lines = charts((tmp_path / "r.html").read_text(encoding="utf-8"))[0]["lines"]
    assert [line["line"]["color"] for line in lines] == [colour for colour in PALETTE[:3] for _ in range(3)]
    assert [line["name"] for line in lines if line["showlegend"]] == ["LoRA", "paper", "auto"]


def test_no_rows_long_runs_and_values_that_are_not_numbers(tmp_path):
    write_report(tmp_path / "empty.html", {"run": []})
    assert charts((tmp_path / "empty.html").read_text(encoding="utf-8")) == []
    odd = {3: None, 1001: 9e9, 4003: -9e9}
    many = [{"step": i, "seconds": i, "loss": odd.get(i, float(i))} for i in range(3 * MAX_POINTS)]
    write_report(tmp_path / "long.html", {"run": many})
    line = charts((tmp_path / "long.html").read_text(encoding="utf-8"))[0]["lines"][0]
    assert len(line["x"]) <= MAX_POINTS
    assert line["x"] == sorted(line["x"])
    assert (line["x"][0], line["x"][-1]) == (0, 3 * MAX_POINTS - 1)
    found = dict(zip(line["x"], line["y"], strict=True))
    assert (found[1001], found[4003]) == (9e9, -9e9)
    assert None not in line["y"]
