"""One self-contained HTML page about one run or several: curves, summary numbers, configuration and versions.

Python writes plain data; a few lines of JavaScript draw it with plotly.js, which is inlined once. Nothing is fetched.
All text from data is escaped, the embedded JSON cannot close its script element, and the page's content-security policy
lets the browser run these scripts, known by their hashes, and load nothing at all.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from celora.files import read_json, write_text
from celora.train.output.folder import METRICS, RUN, finite
from celora.train.progress import PHASES, read_metrics

# Okabe and Ito's palette, told apart with every common kind of colour blindness; yellow is left out, too pale on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# One hue from light to dark: order can be read without seeing colours.
SEQUENTIAL = ("#f7fbff", "#c6dbef", "#6baed6", "#2171b5", "#08306b")
MAX_POINTS = 2000

_SUMMARY = {
    "step": "optimizer steps",
    "loss": "last training loss",
    "eval_loss": "last evaluation loss",
    "seconds": "wall-clock, s",
    "median_step_time_ms": "median step time, ms",
    "tokens_seen": "tokens processed",
    "trainable_parameters": "trainable parameters",
    "estimated_cost": "frozen grad_input FLOPs, relative to exact LoRA",
    "worst_relative_error": "worst relative error of a layer, measured at its latest refresh",
    "layers_measured": "layers measured at a refresh",
    "worst_planned_error": "worst relative error in the plan, of layers not measured since",
    "layers_not_measured": "layers not measured since the plan",
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
    """Write the page about `runs`: name -> output folder, or the rows of its metrics.jsonl.

    Args:
        path: the HTML file; written whole or not at all.
        runs: shown in this order, each in its own colour in every chart, unless `repeats` says otherwise.
        title: of the page.
        results: a first table: what was measured -> run (or arm) -> value.
        findings: plain sentences under it.
        repeats: run -> what it repeats with another seed; runs that repeat the same share a colour and a legend entry.
    """
    rows = {name: _rows(source) for name, source in runs.items()}
    records = {name: _record(source) for name, source in runs.items()}
    columns = {name: record.get("summary", {}) for name, record in records.items()}
    first = [
        *([_table("Results", results)] if results else []),
        *(f"<p>{html.escape(line)}</p>" for line in findings),
    ]
    sections = [
        _table("Summary", {label: {n: c.get(key) for n, c in columns.items()} for key, label in _SUMMARY.items()}),
        _table(
            "Configuration",
            _by_key(records, lambda r: {**r.get("given", {}), "r": r.get("r"), "preset": r.get("preset")}),
        ),
        _table("Estimator", _by_key(records, lambda r: _flat(r.get("config", {})))),
        _table("Versions and machine", _by_key(records, lambda r: {**r.get("versions", {}), **r.get("machine", {})})),
    ]
    maps = [_layer_map(name, record) for name, record in _distinct_layers(records).items()]
    write_text(
        path, _page(title, "".join(first), [*_charts(rows, repeats or {}), *_phases(rows), *maps], "".join(sections))
    )


def _rows(source: Path | Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows, and of each what is a number: plotly.js would show a text, on an axis, with its markup."""
    rows = read_metrics(source / METRICS) if isinstance(source, os.PathLike) else source
    return [{key: value for key, value in row.items() if _is_number(value)} for row in rows]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _record(source: Path | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not isinstance(source, os.PathLike) or not (source / RUN).exists():
        return {}
    record = read_json(source / RUN)
    return record if isinstance(record, dict) else {}


def _charts(rows: Mapping[str, Sequence[Mapping[str, Any]]], repeats: Mapping[str, str]) -> list[dict[str, Any]]:
    """Charts as plotly data: title, axis labels, one line per run and key. Charts without a point are left out."""
    fidelity = sorted({key for run in rows.values() for row in run for key in row if key.startswith("celora/")})
    wanted = [
        ("Training loss by step", "step", "optimizer step", ["loss"], "loss, nats per token"),
        ("Training loss by time", "seconds", "wall-clock, s", ["loss"], "loss, nats per token"),
        ("Held-out loss by step", "step", "optimizer step", ["eval_loss"], "loss, nats per token"),
        ("Held-out loss by time", "seconds", "wall-clock, s", ["eval_loss"], "loss, nats per token"),
        (
            "Held-out token accuracy",
            "step",
            "optimizer step",
            ["eval_mean_token_accuracy"],
            "share of next tokens that are right",
        ),
        ("Step time", "step", "optimizer step", ["step_time_ms"], "time per optimizer step, ms"),
        ("Throughput", "step", "optimizer step", ["tokens_per_second"], "tokens per second, no padding"),
        ("Peak memory", "step", "optimizer step", ["peak_memory_mib"], "MiB, of the process or the device"),
        (
            "Relative error of the estimate at the latest refresh",
            "step",
            "optimizer step",
            [key for key in fidelity if "relative_error" in key],
            "of grad_input, in the layers that have refreshed",
        ),
    ]
    groups = list(dict.fromkeys(repeats.get(name, name) for name in rows))
    charts = []
    for title, x, x_label, keys, y_label in wanted:
        lines: list[dict[str, Any]] = []
        for name, run in rows.items():
            group = repeats.get(name, name)
            colour = PALETTE[groups.index(group) % len(PALETTE)]
            for dash, key in zip(("solid", "dash", "dot"), keys, strict=False):
                points = [(row[x], row[key]) for row in run if key in row and x in row]
                points = _thinned(points)
                if points:
                    label = group if len(keys) == 1 else f"{group}, {key.removeprefix('celora/').replace('_', ' ')}"
                    lines.append(
                        {
                            "name": html.escape(label),
                            "legendgroup": html.escape(label),
                            "showlegend": html.escape(label) not in [line["name"] for line in lines],
                            "x": [p[0] for p in points],
                            "y": [p[1] for p in points],
                            "line": {"color": colour, "dash": dash, "width": 2 if group == name else 1.5},
                            "mode": "lines" if len(points) > 40 else "lines+markers",
                        }
                    )
        if lines:
            charts.append({"title": title, "x": x_label, "y": y_label, "lines": lines})
    return charts


def _thinned(points: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """About MAX_POINTS of them: the lowest and the highest of each stretch, and the last."""
    if len(points) <= MAX_POINTS:
        return points
    size, kept = 1 + 2 * len(points) // MAX_POINTS, {len(points) - 1}
    for begin in range(0, len(points), size):
        stretch = range(begin, min(begin + size, len(points)))
        kept |= {of(stretch, key=lambda i: points[i][1]) for of in (min, max)}
    return [points[i] for i in sorted(kept)]


def _phases(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Where the median step's time goes, one bar for each run."""
    bars: dict[str, dict[str, float]] = {}
    for name, run in rows.items():
        timed = [row for row in run if all(f"{phase}_ms" in row for phase in (*PHASES, "step_time"))]
        if timed:
            parts = {phase: statistics.median(row[f"{phase}_ms"] for row in timed) for phase in PHASES}
            whole = statistics.median(row["step_time_ms"] for row in timed)
            bars[name] = {**parts, "other": max(0.0, whole - sum(parts.values()))}
    if not bars:
        return []
    names = [html.escape(name) for name in bars]
    lines = [
        {
            "type": "bar",
            "orientation": "h",
            "name": phase,
            "y": names,
            "x": [round(of[phase], 2) for of in bars.values()],
            "marker": {"color": PALETTE[i]},
        }
        for i, phase in enumerate((*PHASES, "other"))
    ]
    layout = {
        "barmode": "stack",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        "yaxis": {"autorange": "reversed", "automargin": True},
    }
    return [{"title": "Where a step's time goes", "x": "median time, ms", "y": "", "lines": lines, "layout": layout}]


def _distinct_layers(records: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The first run of each way to estimate the layers."""
    seen: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, record in records.items():
        layers = record.get("layers") or []
        if any(layer.get("estimator") != "dense" for layer in layers):
            seen.setdefault(json.dumps(layers, sort_keys=True), (name, record))
    return dict(seen.values())


def _kinds(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """Kind and block of each layer: a kind is the end of a name, long enough to tell a block's layers apart."""
    parts = [name.split(".") for name in names]
    numbers = [next((part for part in of if part.isdigit()), None) for of in parts]
    blocks = [int(number or 0) for number in numbers]
    for of, number in zip(parts, numbers, strict=True):
        if number is not None and len(of) > 1:
            of.remove(number)
    kinds = [of[-1] for of in parts]
    for length in range(2, max(map(len, parts), default=0) + 1):
        counts = Counter(zip(kinds, blocks, strict=True))
        shared = {kind for (kind, _), count in counts.items() if count > 1}
        kinds = [".".join(of[-length:]) if kind in shared else kind for kind, of in zip(kinds, parts, strict=True)]
    return kinds, blocks


def _layer_map(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Blocks by kinds of layers: what each is estimated with, keeps and costs, its error at the latest refresh or,
    before that, in the plan."""
    measured, planned = (
        {layer: error for layer, error in (record.get(key) or {}).items() if _is_number(error)}
        for key in ("errors", "planned_errors")
    )
    errors = planned | measured
    cells: dict[tuple[str, int], dict[str, Any]] = {}
    layers = record["layers"]
    for layer, kind, block in zip(layers, *_kinds([str(layer["name"]) for layer in layers]), strict=True):
        how = " ".join(str(layer[key]) for key in ("estimator", "selection") if layer[key])
        how += "" if layer["precision"] in ("native", layer["estimator"]) else f" x {layer['precision']}"
        cells[kind, block] = {
            "estimator": how,
            "keep ratio": float(layer["keep_ratio"]),
            "cost": float(layer["cost"]),
            "error": 0.0 if layer["estimator"] == "dense" else errors.get(layer["name"]),
            "planned": layer["name"] in planned and layer["name"] not in measured,
        }
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    blocks = sorted({block for _, block in cells})
    estimators = sorted({cell["estimator"] for cell in cells.values()}, key=lambda how: (how != "dense", how))

    def grid(value: Callable[[dict[str, Any]], Any]) -> list[list[Any]]:
        return [[value(cells[kind, block]) if (kind, block) in cells else None for block in blocks] for kind in kinds]

    shared = {
        "type": "heatmap", "x": blocks, "y": [html.escape(kind) for kind in kinds],
        "text": grid(lambda cell: html.escape(_told(cell))),
        "hovertemplate": "block %{x}, %{y}<br>%{text}<extra></extra>", "xgap": 1, "ygap": 1,
    }  # fmt: skip
    bar = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "ypad": 4, "thickness": 12}
    scale = [[i / 4, colour] for i, colour in enumerate(SEQUENTIAL)]
    n = len(estimators)
    named = {
        "name": "estimator",
        "z": grid(lambda cell: estimators.index(cell["estimator"])),
        "zmin": -0.5,
        "zmax": n - 0.5,
        "colorscale": [[(i + end) / n, PALETTE[i % len(PALETTE)]] for i in range(n) for end in (0, 1)],
        "colorbar": bar | {"tickvals": list(range(n)), "ticktext": [html.escape(how) for how in estimators]},
    }
    views = [
        {
            "name": key,
            "z": grid(lambda cell, key=key: cell[key]),  # type: ignore[misc]
            "zmin": 0,
            **({} if top is None else {"zmax": top}),
            "colorscale": scale,
            "colorbar": bar,
        }
        for key, top in (
            ("keep ratio", 1.0),
            ("cost", 1.0),
            ("error", None),
        )
    ]
    views = [named, *views]
    # plotly.js lays a horizontal colour bar's title over the bar, so the axis below the map says what is coloured.
    colours = [f"block; colour: {what}" for what in ("estimator", "keep ratio", "FLOPs over dense", "relative error")]
    lines = [shared | view | {"visible": i == 0} for i, view in enumerate(views)]
    toggle = {
        "type": "buttons", "direction": "right", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom",
        "showactive": True, "pad": {"b": 6},
        "buttons": [
            {
                "label": view["name"],
                "method": "update",
                "args": [{"visible": [view is other for other in views]}, {"xaxis.title.text": colour}],
            }
            for view, colour in zip(views, colours, strict=True)
        ],
    }  # fmt: skip
    layout = {
        "updatemenus": [toggle],
        "showlegend": False,
        "xaxis": {"dtick": max(1, len(blocks) // 12), "showgrid": False},
        "yaxis": {"autorange": "reversed", "automargin": True, "showgrid": False},
        "margin": {"t": 50, "r": 10, "l": 50, "b": 105},
    }
    return {"title": f"Layers of {name}", "x": colours[0], "y": "", "lines": lines, "layout": layout}


def _told(cell: Mapping[str, Any]) -> str:
    """What is known of one layer, for where a pointer rests on it."""
    error = "not measured" if cell["error"] is None else f"{cell['error']:.3f}"
    error += " by the plan, not measured since" if cell["planned"] else ""
    return f"{cell['estimator']}, keep ratio {cell['keep ratio']:g}, cost {cell['cost']:.2f}, relative error {error}"


def _by_key(records: Mapping[str, dict[str, Any]], pick: Any) -> dict[str, dict[str, Any]]:
    picked = {name: pick(record) for name, record in records.items()}
    keys = dict.fromkeys(key for values in picked.values() for key in values)
    return {key: {name: values.get(key) for name, values in picked.items()} for key in keys}


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in config.items() if key != "overrides"}
    return flat | {
        pattern: ", ".join(f"{k} {v}" for k, v in s.items()) for pattern, s in config.get("overrides", {}).items()
    }


def _table(title: str, cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Rows of name -> run -> value, without rows that are empty for every run."""
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
    """JSON for inside a script element: no `<`, so nothing in it can end the element or begin a comment."""
    text = json.dumps(finite(value), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(scripts: Sequence[str], styles: Sequence[str]) -> str:
    """Nothing may be loaded or sent, and only these inline scripts and styles count: none that a hostile text brings.

    A `<meta http-equiv=refresh>` is beyond any policy of a page: against that there is only the escaping.
    plotly.js sets style attributes, fills an empty style element by script, and draws heat maps as `data:` images.
    """
    script, style = (" ".join(map(_hash, sources)) for sources in (scripts, styles))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; "
        "style-src-attr 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def _hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _page(title: str, first: str, charts: list[dict[str, Any]], tables: str) -> str:
    from plotly.offline import get_plotlyjs

    figures = "".join(
        f"<h2>{html.escape(chart['title'])}</h2><div class=chart id=chart{i}></div>" for i, chart in enumerate(charts)
    )
    plotly = get_plotlyjs()
    its_styles = re.findall(r"\.textContent='([^'\\]*)'", plotly)  # of its maps; without it the browser would complain
    policy = _policy((plotly, _SCRIPT), (_STYLE, "", *its_styles))
    return f"""<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name=viewport content="width=device-width, initial-scale=1">
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
