"""The map of layers: each layer's estimator, what it keeps, what it costs and what it loses."""

from __future__ import annotations

import json

import pytest

from celora.files import write_json
from celora.train.report import write_report
from reports import LAYERS, ROWS, charts, run_folder


def test_where_the_time_goes_and_what_each_layer_gets(tmp_path):
    write_report(tmp_path / "r.html", {"a": run_folder(tmp_path), "b": ROWS}, findings=["<b>plain</b>"])
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    drawn = {chart["title"]: chart for chart in charts(page)}
    bars = drawn["Where a step's time goes"]
    assert [line["name"] for line in bars["lines"]] == ["forward", "backward", "optimizer", "other"]
    assert [line["x"] for line in bars["lines"]] == [[3.0], [5.0], [1.0], [1.0]]
    assert drawn["Peak memory"]["lines"][0]["y"] == [500.0] * 8
    estimator, keep, cost, error = drawn["Layers of a"]["lines"]
    assert [line["name"] for line in (estimator, keep, cost, error)] == ["estimator", "keep ratio", "cost", "error"]
    assert [line["visible"] for line in (estimator, keep, cost, error)] == [True, False, False, False]
    assert estimator["z"] == [[0] * 3, [1] * 3]
    assert estimator["colorbar"]["ticktext"] == ["dense", "tokens energy"]
    assert keep["z"] == [[0.5] * 3, [0.5] * 3]
    assert cost["y"] == ["q_proj", "up_proj"]
    assert cost["x"] == [0, 1, 2]
    assert cost["z"] == [[1.0] * 3, [0.6] * 3]
    assert error["z"] == [[0.0] * 3, [0.2, None, 0.3]]
    assert cost["text"][1][:2] == [
        "tokens energy, keep ratio 0.5, cost 0.60, relative error 0.200",
        "tokens energy, keep ratio 0.5, cost 0.60, relative error not measured",
    ]
    assert "&lt;b&gt;plain" in page


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"], ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]),
        (["a.layer.0.q", "b.layer.0.q"], ["a.layer.0.q", "b.layer.0.q"]),
    ],
)
def test_layers_of_one_last_name_are_told_apart(names, kinds, tmp_path):
    run = run_folder(tmp_path)
    record = json.loads((run / "run.json").read_text())
    record["layers"] = [LAYERS[1] | {"name": f"h.{block}.{name}"} for block in range(2) for name in names]
    write_json(run / "run.json", record)
    write_report(tmp_path / "r.html", {"a": run})
    layers = charts((tmp_path / "r.html").read_text(encoding="utf-8"))[-1]["lines"][0]
    assert layers["y"] == kinds
    assert layers["z"] == [[0, 0]] * len(kinds)
