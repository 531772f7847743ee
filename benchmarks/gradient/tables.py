"""Tables and pictures of how near an estimated LoRA gradient is to the exact one."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.gradient import bfloat16_tables
from celora.studies.cells import Cell, shape_config

HERE = Path(__file__).parent


def fidelity() -> str:
    """What each setting keeps of the LoRA gradient."""
    found = rows.read(HERE / "fidelity.jsonl")
    body = []
    for key in dict.fromkeys((row["setting"], row["selection"]) for row in found):
        matching = [row for row in found if (row["setting"], row["selection"]) == key]
        cosines = [row["cosine"] for row in matching]
        body.append(
            [
                key[0],
                key[1],
                f"{'≤ ' if 'energy' in key[0] else ''}{matching[0]['cost']:.2f}",  # the data decide
                f"{statistics.mean(cosines):.2f} ({min(cosines):.2f} to {max(cosines):.2f})",
                f"{statistics.mean(row['relative_error'] for row in matching):.2f}",
            ]
        )
    header = ["setting", "selection", "FLOPs", "cosine (range over seeds)", "relative error"]
    return rows.markdown(header, body) + _made_with(found)


def adam() -> str:
    """What each setting keeps of the gradient, and of the gradient as Adam scales it."""
    found = rows.read(HERE / "adam.jsonl")
    body = []
    for setting in dict.fromkeys(row["setting"] for row in found):
        matching = [row for row in found if row["setting"] == setting]
        cosines = [statistics.mean(row[name] for row in matching) for name in ("cosine", "adam_cosine")]
        ratios = [row["adam_squared_error"] / row["squared_error"] for row in matching]
        ratio = f"{statistics.mean(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        body.append([setting, *(f"{cosine:.4f}" for cosine in cosines), ratio])
    header = ["setting", "cosine", "cosine as Adam scales it", "ratio of the squared errors (range over seeds)"]
    return rows.markdown(header, body) + _made_with(found)


def outliers() -> str:
    """What 8 bits cost the gradient of models with outlier features, and of the same without them."""
    found = rows.read(HERE / "outliers.jsonl")
    settings = list(dict.fromkeys(row["setting"] for row in found))
    body = []
    for model in dict.fromkeys(row["model"] for row in found):
        cells = [model]
        for setting in settings:
            cosines = [row["cosine"] for row in found if (row["model"], row["setting"]) == (model, setting)]
            cells.append(f"{statistics.median(cosines):.3f} ({min(cosines):.3f} to {max(cosines):.3f})")
        body.append(cells)
    seeds, batches = (len({row[name] for row in found}) for name in ("seed", "batch"))
    places = "; ".join(sorted({rows.where(row) for row in found}))
    table = rows.markdown(["model", *settings], body)
    return f"{table}\n\nCosine, median (range). float32, {seeds} seeds with {batches} batches each. {places}."


def _made_with(found: list[dict[str, Any]]) -> str:
    seeds, first = len({row["seed"] for row in found}), rows.where(found[0])
    elsewhere = {row["setting"]: place for row in found if (place := rows.where(row)) != first}
    told = "".join(f" {setting}: {place}." for setting, place in elsewhere.items())
    return f"\n\nSmolLM2-135M ({rows.UNPACKED}; float32), {seeds} seeds, {first}.{told}"


def frontier() -> str:
    """Plans: what was asked for, what was audited, what it takes."""
    return _frontier("bfloat16", amx=False)


def frontier_amx() -> str:
    """The same where the CPU has matrix instructions."""
    return _frontier("bfloat16", amx=True)


def frontier_float32() -> str:
    """The same on a CPU that emulates bfloat16, against the float32 products that are the fast ones there."""
    return _frontier("float32", amx=False)


def _frontier(dtype: str, *, amx: bool) -> str:
    found = rows.select(HERE / "frontier.jsonl", dtype=dtype, amx=amx)
    body = []
    for row in found:
        labels = "all" if not row["masked"] else f"{1 - row['masked']:.0%}"
        cells = [row["model"], labels, f"{row['fidelity']:g}", f"{row['predicted_cosine']:.3f}"]
        body.append([*cells, f"{row['audited_cosine']:.3f}", f"{row['audited_time']:.2f}"])
    one = found[0]
    return (
        rows.markdown(["model", "labelled", "asked for", "predicted", "audited cosine", "grad_input time"], body)
        + f"\n\nT = {one['tokens']}, {one['dtype']}, {rows.where(one)}; "
        f"8-bit copies of the weights without a limit. {_shapes_of_frontier(found)} Audited on "
        f"{_audited_on(found)}, which also decided whether to allow less error."
    )


def _shapes_of_frontier(found: list[dict[str, Any]]) -> str:
    """What the models of `frontier.py` are, in words."""
    hidden = shape_config(Cell("h2048-v32k", "full"))
    words = {
        "SmolLM2-135M": f"SmolLM2-135M: {rows.UNPACKED}.",
        "hidden 2048": f"Hidden 2048: a Llama of random weights, {hidden.num_hidden_layers} blocks.",
        "hidden 2048, random tokens": "Hidden 2048 with random tokens: random weights, 3 blocks.",
    }
    return " ".join(words[name] for name in dict.fromkeys(row["model"] for row in found))


def _audited_on(found: list[dict[str, Any]]) -> str:
    numbers = {row["audited_batches"] for row in found}
    words = ["one batch" if number == 1 else f"the sum of {number} batches" for number in sorted(numbers)]
    return " or ".join(words)


def frontier_picture(*, amx: bool) -> str:
    """Cosine against time as an SVG: one line for each model and labelling, the asked-for bars as they come."""
    found = rows.select(HERE / "frontier.jsonl", dtype="bfloat16", amx=amx)
    width, height, left, top, right = 720, 360, 60, 20, 220
    low = min(0.75, *(row["audited_cosine"] for row in found))

    def at(time: float, cosine: float) -> tuple[float, float]:
        return left + time * (width - left - right), top + (1 - cosine) / (1 - low) * (height - top - 50)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i in range(6):
        x, y = at(i / 5, low)
        parts.append(f'<line x1="{x:.0f}" y1="{top}" x2="{x:.0f}" y2="{y:.0f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.0f}" y="{y + 18:.0f}" text-anchor="middle">{i / 5:.1f}</text>')
        x, y = at(0, low + (1 - low) * i / 5)
        parts.append(f'<line x1="{x:.0f}" y1="{y:.0f}" x2="{at(1, low)[0]:.0f}" y2="{y:.0f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 8:.0f}" y="{y + 4:.0f}" text-anchor="end">{low + (1 - low) * i / 5:.2f}</text>')
    x, y = at(0.5, low)
    parts.append(f'<text x="{x:.0f}" y="{y + 38:.0f}" text-anchor="middle">grad_input time, share of dense</text>')
    parts.append(
        f'<text x="14" y="{height / 2:.0f}" text-anchor="middle" transform="rotate(-90 14 {height / 2:.0f})">'
        "cosine of the LoRA gradient</text>"
    )
    # Okabe and Ito's colours, and a marker of its own for each line: readable without seeing colours.
    styles = [
        ("#0072b2", "5"),
        ("#d55e00", "0"),
        ("#009e73", "5"),
        ("#cc79a7", "0"),
        ("#000000", "5"),
        ("#56b4e9", "0"),
    ]
    lines = list(dict.fromkeys((row["model"], row["masked"]) for row in found))
    for (model, masked), (colour, dash) in zip(lines, styles, strict=False):
        line = sorted(
            (r["audited_time"], r["audited_cosine"]) for r in found if (r["model"], r["masked"]) == (model, masked)
        )
        points = [at(*point) for point in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        )
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        y = top + 14 + 34 * lines.index((model, masked))
        parts.append(f'<circle cx="{width - right + 10}" cy="{y - 4}" r="4" fill="{colour}"/>')
        labels = "all labelled" if not masked else f"{1 - masked:.0%} labelled"
        parts.append(f'<text x="{width - right + 20}" y="{y}">{model}</text>')
        parts.append(f'<text x="{width - right + 20}" y="{y + 14}" fill="#555">{labels}</text>')
    return "\n".join([*parts, "</svg>", ""])


TABLES: dict[str, Callable[[], str]] = {
    "fidelity": fidelity,
    "adam": adam,
    "outliers": outliers,
    "frontier": frontier,
    "frontier_amx": frontier_amx,
    "frontier_float32": frontier_float32,
    **bfloat16_tables.TABLES,
}
PICTURES: dict[str, Callable[[], str]] = {
    "frontier.svg": functools.partial(frontier_picture, amx=False),
    "frontier-amx.svg": functools.partial(frontier_picture, amx=True),
}
