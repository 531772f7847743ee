"""The report is one file that fetches nothing, and no text from data can leave its place."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
from pathlib import Path
from shutil import which

import pytest

from celora.train import report
from celora.train.output.folder import write_json
from celora.train.report import MAX_POINTS, PALETTE, write_report

ROWS = [
    {"step": i, "seconds": 0.5 * i, "loss": 4.0 / i, "step_time_ms": 10.0, "celora/relative_error": 0.3}
    for i in range(1, 9)
]

DAMAGED = pytest.mark.filterwarnings("ignore:.* not a metrics row; it is left out")


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
    """More runs than colours, as any comparison with seeds has, and still no colour means two things."""
    runs = {f"{arm}, seed {seed}": ROWS for arm in ("LoRA", "paper", "auto") for seed in range(3)}
    write_report(tmp_path / "r.html", runs, repeats={name: name.split(",")[0] for name in runs})
    lines = charts((tmp_path / "r.html").read_text(encoding="utf-8"))[0]["lines"]
    assert [line["line"]["color"] for line in lines] == [colour for colour in PALETTE[:3] for _ in range(3)]
    assert [line["name"] for line in lines if line["showlegend"]] == ["LoRA", "paper", "auto"]


def test_self_contained_responsive_and_dark(tmp_path):
    write_report(tmp_path / "r.html", {"run": ROWS})
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("Plotly.react(") == 1
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=", page)
    assert "prefers-color-scheme: dark" in page
    assert "name=viewport" in page


@DAMAGED
@pytest.mark.fault(
    "security",
    "HTML or script in a name, a value or a text that the report shows",
    sees="the text, as text",
    kept="the report: nothing leaves its place, nothing runs",
)
def test_text_from_data_is_escaped(tmp_path):
    evil = EVIL + REFRESH
    run = hostile_run(tmp_path, evil)
    write_report(tmp_path / "r.html", {evil: run}, title=evil, findings=[evil], results={evil: {evil: evil}})
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    markup = re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    assert "<img" not in markup
    assert re.findall(r"<meta (\S+?)[ =>]", markup) == ["charset", "http-equiv", "name"]
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="(.*?)">', page)[1]
    assert policy.startswith("default-src 'none'; script-src " + " ".join(map(report._hash, scripts)))
    assert page.index("Content-Security-Policy") < page.index("<title>")
    drawn = charts(page)
    assert drawn[0]["lines"][0]["name"].startswith("&lt;/script")
    lines = [line | {"hovertemplate": ""} for chart in drawn for line in chart["lines"]]  # which has markup of its own
    assert "<" not in json.dumps(lines)
    curves = [line for line in lines if "mode" in line]
    assert {type(value) for line in curves for value in line["x"] + line["y"]} == {int, float}
    assert curves[0]["x"] == [*range(1, 9)]


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


LAYERS = [
    {"name": f"model.layers.{block}.{kind}", "out_features": 8, "in_features": 8, "estimator": how, "cost": cost,
     "keep_ratio": 0.5, "rank": 0, "reason": "", "selection": "energy" if how == "tokens" else "",
     "precision": "native"}
    for block in range(3)
    for kind, how, cost in (("q_proj", "dense", 1.0), ("up_proj", "tokens", 0.6))
]  # fmt: skip
REFRESH = "<meta http-equiv=refresh content='0;url=https://example.invalid/'>"
EVIL = "</script><script>document.title='owned'</script><img src=https://example.invalid/x>"


def run_folder(folder: Path, name: str = "run") -> Path:
    run = folder / name
    run.mkdir()
    record = {
        "celora": "0", "given": {"model": EVIL, EVIL: EVIL}, "layers": LAYERS,
        "errors": {"model.layers.0.up_proj": 0.2, "model.layers.2.up_proj": 0.3},
    }  # fmt: skip
    write_json(run / "run.json", record)
    phases = {"forward_ms": 3.0, "backward_ms": 5.0, "optimizer_ms": 1.0, "peak_memory_mib": 500.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row | phases) + "\n" for row in ROWS))
    return run


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


def test_what_only_the_plan_has_measured_is_told_as_such(tmp_path):
    run = run_folder(tmp_path)
    record = json.loads((run / "run.json").read_text())
    planned = {f"model.layers.{block}.up_proj": 0.8 for block in range(3)}
    summary = {"worst_relative_error": 0.3, "layers_measured": 2, "worst_planned_error": 0.8, "layers_not_measured": 1}
    write_json(run / "run.json", record | {"planned_errors": planned, "summary": summary})
    write_report(tmp_path / "r.html", {"a": run})
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    error = charts(page)[-1]["lines"][-1]
    assert error["z"] == [[0.0] * 3, [0.2, 0.8, 0.3]]
    told = "tokens energy, keep ratio 0.5, cost 0.60, relative error"
    assert error["text"][1][:2] == [f"{told} 0.200", f"{told} 0.800 by the plan, not measured since"]
    rows = dict(re.findall(r"<tr><th scope=row>([^<]*)</th><td>([^<]*)</td></tr>", page))
    assert rows["worst relative error of a layer, measured at its latest refresh"] == "0.3"
    assert rows["layers measured at a refresh"] == "2"
    assert rows["worst relative error in the plan, of layers not measured since"] == "0.8"
    assert rows["layers not measured since the plan"] == "1"


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


CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := which(name))), None)
PROBE = """
addEventListener("load", () => setTimeout(() => {
  const charts = [...document.querySelectorAll(".chart")];
  const before = charts.at(-1).data.map(trace => trace.visible);
  charts.at(-1).querySelectorAll(".updatemenu-button")[1].dispatchEvent(new MouseEvent("click", {bubbles: true}));
  setTimeout(() => {
    const out = document.createElement("pre");
    out.id = "probe";
    out.textContent = JSON.stringify({
      points: charts.map(chart => chart.data.map(trace => trace.x.length)), before,
      after: charts.at(-1).data.map(trace => trace.visible), title: document.title,
      requests: performance.getEntriesByType("resource").length, width: document.documentElement.scrollWidth,
    });
    document.body.append(out);
  }, 200);
}, 200));
"""


def with_script(page: str, script: str) -> str:
    """The page with one more script, which its policy is told to run."""
    page = page.replace("script-src ", f"script-src {report._hash(script)} ", 1)
    return page.replace("</html>", f"<script>{script}</script></html>")


def browse(page: str, folder: Path, width: int = 1200) -> tuple[dict, str]:
    """What the probe finds in Chromium, and what the console said."""
    assert CHROMIUM is not None, "continuous integration needs Chromium, so that these tests run somewhere"
    (folder / "probed.html").write_text(with_script(page, PROBE), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
         f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", "--virtual-time-budget=5000",
         "--dump-dom", (folder / "probed.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = json.loads(html.unescape(re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)[1]))
    return found, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


# A browser is no dependency of the project: where there is none, the tests above check what the page holds. Only
# continuous integration has to have one: there the tests below fail without.
in_a_browser = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CELORA_BROWSER_REQUIRED"), reason="no Chromium here"
)


@DAMAGED
@in_a_browser
@pytest.mark.parametrize("width", [1200, 400], ids=["desk", "phone"])
def test_in_a_real_browser(width, tmp_path):
    """No console error, no request, all points drawn, the toggle toggles, hostile text stays text, a phone fits."""
    write_report(tmp_path / "r.html", {EVIL: hostile_run(tmp_path)}, title=EVIL, findings=[EVIL])
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    found, console = browse(page, tmp_path, width)
    assert console == ""
    expected = [[len(line["x"]) for line in chart["lines"]] for chart in charts(page)]
    assert found["points"] == expected
    assert (found["before"], found["after"]) == ([True, False, False, False], [False, True, False, False])
    assert found["requests"] == 0
    assert found["title"] == EVIL
    assert found["width"] <= max(width, 500)  # headless Chromium is never narrower than 500


@pytest.mark.fault(
    "security",
    "a hostile text gets into report.html unescaped after all",
    sees="the report, as ever",
    kept="its content-security policy: no foreign script runs, nothing is loaded or sent",
)
@in_a_browser
def test_the_policy_holds_where_escaping_would_fail(tmp_path):
    write_report(tmp_path / "r.html", {"run": run_folder(tmp_path)}, title="plain")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    attack = f"{EVIL}<svg onload=\"document.title='owned'\"></svg><style>body {{ display: none }}</style>"
    found, console = browse(page.replace("<main>", f"<main>{attack}"), tmp_path)
    assert found["title"] == "plain"
    for refused in ("inline script", "inline event handler", "inline style", "Loading the image"):
        assert refused in console


def hostile_run(folder: Path, evil: str = EVIL) -> Path:
    """A run whose every text is hostile, and texts and no numbers where numbers belong."""
    run = run_folder(folder)
    names = (evil, "loss", "seconds", "step_time_ms", "forward_ms", "celora/relative_error", "eval_loss")
    rows = [
        {"step": 9} | dict.fromkeys(names, evil),
        {"step": 10, "loss": 0.5, "seconds": [evil], "step_time_ms": {evil: evil}},
        {"step": 11, "loss": 10**400, "seconds": True, "step_time_ms": float("nan")},
        {"step": 12, f"celora/relative_error{evil}": 0.5},
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    record = json.loads((run / "run.json").read_text())
    for layer in record["layers"]:
        layer |= {"name": f"{layer['name']}.{evil.replace('.', '')}", "selection": evil, "precision": evil}
        layer |= {"estimator": evil if layer["estimator"] == "tokens" else "dense"}
    record |= {"preset": evil, "config": {evil: evil, "overrides": {evil: {evil: evil}}}, "versions": {evil: evil},
               "machine": {evil: [evil, {evil: evil}]}, "summary": {"loss": evil},
               "errors": {layer["name"]: evil for layer in record["layers"]}}  # fmt: skip
    write_json(run / "run.json", record)
    return run
