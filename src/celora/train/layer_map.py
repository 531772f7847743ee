"""The map of a run's layers as plain plotly data: one row for each kind of layer, one column for each block.

Buttons choose what the colours show: the estimator, the keep ratio, the cost or the error.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from celora.train.charts import PALETTE, is_number

# One hue from light to dark, so that the order is visible without seeing colours.
SEQUENTIAL = ("#f7fbff", "#c6dbef", "#6baed6", "#2171b5", "#08306b")
Cells = dict[tuple[str, int], dict[str, Any]]  # (kind, block) -> facts about the layer


def can_be_drawn(layers: Any) -> bool:
    """Whether these are the layers of a run.json, with all that a map shows of them."""
    texts, numbers = ("name", "estimator", "selection", "precision"), ("keep_ratio", "cost")
    return isinstance(layers, list) and all(
        isinstance(layer, dict)
        and all(isinstance(layer.get(key), str) for key in texts)
        and all(is_number(layer.get(key)) for key in numbers)
        for layer in layers
    )


def distinct_layers(records: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """One run for each distinct way to estimate the layers: the first that does so."""
    seen: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, record in records.items():
        layers = record.get("layers") or []
        if any(layer.get("estimator") != "dense" for layer in layers):
            seen.setdefault(json.dumps(layers, sort_keys=True), (name, record))
    return dict(seen.values())


def layer_map(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """The map of run `name`, whose `run.json` is `record`."""
    cells = _cells(record)
    blocks = sorted({block for _, block in cells})
    views = _views(cells, blocks)
    # plotly.js draws the title of a horizontal colour bar over the bar, so the axis title says what the colours show.
    colours = [f"block; colour: {what}" for what in ("estimator", "keep ratio", "FLOPs over dense", "relative error")]
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
    lines = [view | {"visible": i == 0} for i, view in enumerate(views)]
    return {"title": f"Layers of {name}", "x": colours[0], "y": "", "lines": lines, "layout": layout}


def _cells(record: Mapping[str, Any]) -> Cells:
    """Estimator, keep ratio, cost and error of each layer."""
    errors = {layer: error for layer, error in (record.get("errors") or {}).items() if is_number(error)}
    cells: Cells = {}
    layers = record["layers"]
    for layer, kind, block in zip(layers, *_kinds([str(layer["name"]) for layer in layers]), strict=True):
        how = " ".join(str(layer[key]) for key in ("estimator", "selection") if layer[key])
        how += "" if layer["precision"] in ("native", layer["estimator"]) else f" x {layer['precision']}"
        cells[kind, block] = {
            "estimator": how,
            "keep ratio": float(layer["keep_ratio"]),
            "cost": float(layer["cost"]),
            "error": 0.0 if layer["estimator"] == "dense" else errors.get(layer["name"]),
        }
    return cells


def _kinds(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """Kind and block of each layer. The kind is the end of its name, long enough to be unique within a block."""
    split = [name.split(".") for name in names]
    numbers = [next((part for part in parts if part.isdigit()), None) for parts in split]
    blocks = [int(number or 0) for number in numbers]
    for parts, number in zip(split, numbers, strict=True):
        if number is not None and len(parts) > 1:
            parts.remove(number)
    kinds = [parts[-1] for parts in split]
    for length in range(2, max(map(len, split), default=0) + 1):
        counts = Counter(zip(kinds, blocks, strict=True))
        shared = {kind for (kind, _), count in counts.items() if count > 1}
        kinds = [
            ".".join(parts[-length:]) if kind in shared else kind for kind, parts in zip(kinds, split, strict=True)
        ]
    return kinds, blocks


def _views(cells: Cells, blocks: Sequence[int]) -> list[dict[str, Any]]:
    """One heat map for each button: estimator, keep ratio, cost, error."""
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
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
    measured = [
        {
            "name": key,
            "z": grid(lambda cell, key=key: cell[key]),  # type: ignore[misc]
            "zmin": 0,
            **({} if top is None else {"zmax": top}),
            "colorscale": scale,
            "colorbar": bar,
        }
        for key, top in (("keep ratio", 1.0), ("cost", 1.0), ("error", None))
    ]
    return [shared | view for view in (named, *measured)]


def _told(cell: Mapping[str, Any]) -> str:
    """The text shown when the pointer rests on a layer."""
    error = "not measured" if cell["error"] is None else f"{cell['error']:.3f}"
    return f"{cell['estimator']}, keep ratio {cell['keep ratio']:g}, cost {cell['cost']:.2f}, relative error {error}"
