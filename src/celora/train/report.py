"""Writes one self-contained HTML page about one run or several: curves, summary, configuration and versions.

Python writes plain data. A few lines of JavaScript draw it with plotly.js, which is inlined once. The page fetches
nothing, and loads itself anew while one of its runs goes on. All text from data is escaped, and the embedded JSON
cannot close its script element. The page's content-security policy lets the browser run only these scripts, by their
hashes, and load nothing.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from celora.files import finite, read_json, write_text
from celora.train.charts import is_number, line_charts, phase_charts
from celora.train.decisions import decision_rows, estimator_rows
from celora.train.layer_map import can_be_drawn, distinct_layers, layer_map
from celora.train.output.folder import METRICS, RUN
from celora.train.progress import read_metrics
from celora.train.wall_clock import PARTS, spent

EVERY_S = 30  # seconds between two reports of a running run, and after which the open page reloads itself

_SUMMARY = {
    "step": "optimizer steps",
    "loss": "last training loss",
    "eval_loss": "last evaluation loss",
    "eval_base_loss": "the same on the original base",
    "seconds": "wall-clock, s",
    "median_step_time_ms": "median step time, ms",
    "tokens_seen": "tokens processed",
    "trainable_parameters": "trainable parameters",
    "estimated_cost": "frozen grad_input FLOPs, relative to exact LoRA",
    "worst_relative_error": "worst relative error of a layer, measured at its latest refresh",
    "layers_measured": "layers measured at a refresh",
    "worst_forward_error": "worst relative error of a forward in 8 bits, measured at its latest refresh",
    "forwards_made_exact": "forwards in 8 bits that became exact, because of their error",
}


def write_report(
    path: Path,
    runs: Mapping[str, Path | Sequence[Mapping[str, Any]]],
    *,
    title: str = "celora training report",
    results: Mapping[str, Mapping[str, Any]] | None = None,
    findings: Sequence[str] = (),
    repeats: Mapping[str, str] | None = None,
) -> None:
    """Write the page about `runs` into the file `path`, whole or not at all. The other arguments are `make_page`'s."""
    write_text(path, make_page(runs, title=title, results=results, findings=findings, repeats=repeats))


def make_page(
    runs: Mapping[str, Path | Sequence[Mapping[str, Any]]],
    *,
    title: str = "celora training report",
    results: Mapping[str, Mapping[str, Any]] | None = None,
    findings: Sequence[str] = (),
    repeats: Mapping[str, str] | None = None,
) -> str:
    """The page about `runs`, as HTML.

    Args:
        runs: name -> output folder, or the rows of its metrics.jsonl. Shown in this order. Each run has its own colour,
            unless `repeats` says otherwise.
        title: title of the page.
        results: the first table: what was measured -> run (or arm) -> value.
        findings: plain sentences under that table.
        repeats: run -> the arm that it repeats with another seed. Runs of one arm share a colour and a legend entry.
    """
    rows = {name: _rows(source) for name, source in runs.items()}
    records = {name: _record(source) for name, source in runs.items()}
    columns = {name: record.get("summary") or _so_far(rows[name]) for name, record in records.items()}
    running = [name for name, record in records.items() if record.get("status") == "running"]
    first = [
        *(f"<p>{html.escape(name)} goes on; this page loads itself anew every {EVERY_S} s.</p>" for name in running),
        *([_table("Results", results)] if results else []),
        *(f"<p>{html.escape(line)}</p>" for line in findings),
    ]
    parts = {name: spent(column) for name, column in columns.items()}
    peft = {"train with PEFT alone, about": {n: c.get("train_seconds_of_peft") for n, c in columns.items()}}
    sections = [
        _table("Summary", {label: {n: c.get(key) for n, c in columns.items()} for key, label in _SUMMARY.items()}),
        _table(
            "Wall-clock of the latest call, s",
            {part: {n: s.get(part) for n, s in parts.items()} for part in PARTS} | peft,
        ),
        _table(
            "Configuration",
            _by_key(records, lambda r: {**r.get("given", {}), "r": r.get("r"), "preset": r.get("preset")}),
        ),
        _table("Estimator", _by_key(records, estimator_rows)),
        _table("Decisions", _by_key(records, decision_rows)),
        _table("Versions and machine", _by_key(records, lambda r: {**r.get("versions", {}), **r.get("machine", {})})),
    ]
    maps = [layer_map(name, record) for name, record in distinct_layers(records).items()]
    charts = [*line_charts(rows, repeats or {}), *phase_charts(rows), *maps]
    return _page(title, "".join(first), charts, "".join(sections), reloads=bool(running))


def _rows(source: Path | Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows, without values that are not numbers: plotly.js would interpret markup in a text."""
    rows = read_metrics(source / METRICS) if isinstance(source, os.PathLike) else source
    return [{key: value for key, value in row.items() if is_number(value)} for row in rows]


def _so_far(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The summary of a running run."""
    found: dict[str, Any] = {}
    for row in rows:
        found |= {key: row[key] for key in _SUMMARY if key in row}
    return found


def _record(source: Path | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not isinstance(source, os.PathLike) or not (source / RUN).exists():
        return {}
    record = read_json(source / RUN)
    if not isinstance(record, dict):
        return {}
    kinds = dict.fromkeys(("given", "config", "settled", "versions", "machine", "errors"), dict)
    readable = {key: value for key, value in record.items() if isinstance(value, kinds.get(key, object))}
    return readable if can_be_drawn(readable.get("layers")) else readable | {"layers": []}


def _by_key(records: Mapping[str, dict[str, Any]], pick: Any) -> dict[str, dict[str, Any]]:
    picked = {name: pick(record) for name, record in records.items()}
    keys = dict.fromkeys(key for values in picked.values() for key in values)
    return {key: {name: values.get(key) for name, values in picked.items()} for key in keys}


def _table(title: str, cells: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of name -> run -> value, without rows that are empty for every run."""
    cells = {key: values for key, values in cells.items() if any(value is not None for value in values.values())}
    if not cells:
        return ""
    names = list(next(iter(cells.values())))
    head = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr><th scope=row>{html.escape(key)}</th>{''.join(f'<td>{_cell(v)}</td>' for v in values.values())}</tr>"
        for key, values in cells.items()
    )
    return f"<h2>{html.escape(title)}</h2><div class=wide><table><tr><td></td>{head}</tr>{body}</table></div>"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return html.escape(value if isinstance(value, str) else json.dumps(value, default=str))


def _embed(value: Any) -> str:
    """JSON to embed in a script element. It holds no `<`, so it cannot end the element or begin a comment."""
    text = json.dumps(finite(value), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(scripts: Sequence[str], styles: Sequence[str]) -> str:
    """The content-security policy: load and send nothing, and run only these inline scripts and styles.

    A script in a hostile text has another hash, and is not run. No policy stops a `<meta http-equiv=refresh>`: only the
    escaping does. The policy allows what plotly.js does: it sets style attributes, fills an empty style element by
    script, and draws heat maps as `data:` images.
    """
    script, style = (" ".join(map(_hash, sources)) for sources in (scripts, styles))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; "
        "style-src-attr 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )


@functools.lru_cache(maxsize=16)  # plotly.js has megabytes
def _hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


@functools.cache
def _plotly() -> tuple[str, list[str]]:
    """plotly.js, and the styles of its maps; the browser complains where the policy leaves those out."""
    from plotly.offline import get_plotlyjs

    source = str(get_plotlyjs())
    return source, re.findall(r"\.textContent='([^'\\]*)'", source)


def _page(title: str, first: str, charts: list[dict[str, Any]], tables: str, *, reloads: bool) -> str:
    plotly, its_styles = _plotly()
    again = f"<meta http-equiv=refresh content={EVERY_S}>\n" if reloads else ""
    figures = "".join(
        f"<h2>{html.escape(chart['title'])}</h2><div class=chart id=chart{i}></div>" for i, chart in enumerate(charts)
    )
    policy = _policy((plotly, _SCRIPT), (_STYLE, "", *its_styles))
    return f"""<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta http-equiv="Content-Security-Policy" content="{policy}">
{again}<meta name=viewport content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
<main><h1>{html.escape(title)}</h1>{first}{figures}{tables}</main>
<script>{plotly}</script>
<script type="application/json" id=charts>{_embed(charts)}</script>
<script>{_SCRIPT}</script>
</html>
"""


_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --page: #ffffff; --line: #d0d0d0 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --page: #16181c; --line: #44474d } }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
.chart { overflow: hidden }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin: 1.5rem 0 .3rem }
.chart { width: 100%; height: min(24rem, 75vw) } .wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; min-width: 6rem }
th[scope=row] { font-weight: 400 }
/* plotly.js gives the pressed button this very pale fill, whatever the page's colours */
.updatemenu-item-rect[style*="244, 250, 255"] { fill: var(--line) !important }
"""

_SCRIPT = """
const charts = JSON.parse(document.getElementById("charts").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
function draw() {
  const css = getComputedStyle(document.documentElement);
  const ink = css.getPropertyValue("--ink"), grid = css.getPropertyValue("--line"), clear = "rgba(0,0,0,0)";
  const axis = title => ({title: {text: title}, gridcolor: grid, linecolor: grid, zeroline: false, automargin: true});
  charts.forEach((chart, i) => Plotly.react("chart" + i, chart.lines.map(line => ({type: "scatter", ...line})), {
    paper_bgcolor: clear, plot_bgcolor: clear, font: {color: ink}, margin: {t: 10, r: 10, l: 50, b: 45},
    showlegend: chart.lines.length > 1, legend: {orientation: "h", y: 1.02, yanchor: "bottom"}, ...chart.layout,
    xaxis: {...axis(chart.x), ...(chart.layout || {}).xaxis}, yaxis: {...axis(chart.y), ...(chart.layout || {}).yaxis},
    updatemenus: ((chart.layout || {}).updatemenus || []).map(m => ({...m, bgcolor: css.getPropertyValue("--page"),
      bordercolor: grid, font: {color: ink}})),
  }, {responsive: true, displaylogo: false, displayModeBar: false}));
}
draw();
dark.addEventListener("change", draw);
"""
