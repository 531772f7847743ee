"""Turns metrics into the charts of a report: plain plotly data with title, axes and lines. `report.py` draws them."""

from __future__ import annotations

import html
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from celora.train.progress import PHASES

# Okabe and Ito's palette, distinct with every common kind of colour blindness; without its yellow, too pale on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MAX_POINTS = 2000


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def line_charts(rows: Mapping[str, Sequence[Mapping[str, Any]]], repeats: Mapping[str, str]) -> list[dict[str, Any]]:
    """Charts as plotly data: title, axis labels, one line per run and key. Charts without a point are left out."""
    fidelity = sorted({key for run in rows.values() for row in run for key in row if key.startswith("celora/")})
    wanted = [
        ("Training loss by step", "step", "optimizer step", ["loss"], "loss, nats per token"),
        ("Training loss by time", "seconds", "wall-clock, s", ["loss"], "loss, nats per token"),
        ("Held-out loss by step", "step", "optimizer step", ["eval_loss", "eval_base_loss"], "loss, nats per token"),
        ("Held-out loss by time", "seconds", "wall-clock, s", ["eval_loss", "eval_base_loss"], "loss, nats per token"),
        (
            "Held-out token accuracy",
            "step",
            "optimizer step",
            ["eval_mean_token_accuracy", "eval_base_mean_token_accuracy"],
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
        (
            "Relative error of forwards in 8 bits at the latest refresh",
            "step",
            "optimizer step",
            [key for key in fidelity if "forward_error" in key],
            "of the output, in the layers that have refreshed",
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
    """About MAX_POINTS of the points: the lowest and the highest of each stretch, and the last one."""
    if len(points) <= MAX_POINTS:
        return points
    size, kept = 1 + 2 * len(points) // MAX_POINTS, {len(points) - 1}
    for begin in range(0, len(points), size):
        stretch = range(begin, min(begin + size, len(points)))
        kept |= {extreme(stretch, key=lambda i: points[i][1]) for extreme in (min, max)}
    return [points[i] for i in sorted(kept)]


def phase_charts(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One bar for each run: how much time each phase of its median step takes."""
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
            "x": [round(bar[phase], 2) for bar in bars.values()],
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
