"""The report is one file that fetches nothing, and text from data cannot become markup or code."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
from pathlib import Path
from shutil import which

import pytest

from celora.files import write_json
from celora.train import report
from celora.train.report import write_report
from reports import EVIL, ROWS, charts, run_folder

DAMAGED = pytest.mark.filterwarnings("ignore:.* not a metrics row; it is left out")


def test_self_contained_responsive_and_dark(tmp_path):
    write_report(tmp_path / "r.html", {"run": ROWS})
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("Plotly.react(") == 1
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=", page)
    assert "prefers-color-scheme: dark" in page
    assert "name=viewport" in page


@DAMAGED
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
    # hover texts have markup of their own
    lines = [line | {"hovertemplate": ""} for chart in drawn for line in chart["lines"]]
    assert "<" not in json.dumps(lines)
    curves = [line for line in lines if "mode" in line]
    assert {type(value) for line in curves for value in line["x"] + line["y"]} == {int, float}
    assert curves[0]["x"] == [*range(1, 9)]


REFRESH = "<meta http-equiv=refresh content='0;url=https://example.invalid/'>"


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
    """What the probe finds in Chromium, and the messages of the console."""
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


# The project does not depend on a browser. Without one, the tests above check what the page holds. Continuous
# integration must have a browser: there the tests below fail without it.
in_a_browser = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CELORA_BROWSER_REQUIRED"), reason="no Chromium here"
)


@DAMAGED
@in_a_browser
@pytest.mark.parametrize("width", [1200, 400], ids=["desk", "phone"])
def test_in_a_real_browser(width, tmp_path):
    """No console error, no request, all points drawn.

    The toggle works, hostile text stays text, a phone's width fits.
    """
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
    """A run whose every text is hostile, with texts in the place of numbers."""
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


LAYER = {"name": "a", "estimator": "tokens", "selection": "topk", "precision": "native", "keep_ratio": 1, "cost": 1}


@pytest.mark.parametrize(
    "damage",
    [
        {"layers": [{"name": "a", "estimator": "tokens"}]},
        {"layers": "none"},
        {"layers": [LAYER | {"cost": "high"}]},
        {"versions": 3},
        {"machine": "this one"},
        {"config": []},
        {"config": {"overrides": None}},
        {"given": None},
        {"layers": [LAYER], "errors": ["a"]},
    ],
)
def test_what_cannot_be_read_of_a_record_is_left_out(damage, tmp_path):
    folder = run_folder(tmp_path)
    write_json(folder / "run.json", json.loads((folder / "run.json").read_text()) | damage)
    write_report(tmp_path / "r.html", {"run": folder})
    assert "Plotly.react(" in (tmp_path / "r.html").read_text(encoding="utf-8")
