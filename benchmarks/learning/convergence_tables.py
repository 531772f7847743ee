"""Tables and a picture of the study of convergence, from the committed rows of `convergence.py`.

Each function returns Markdown that `tables.py` puts between its marks; `picture` returns an SVG.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import rows
from benchmarks.learning import convergence as study

# Okabe and Ito's colours, and a line of its own for each: readable without seeing colours.
_LINES = {"LoRA": ("#0072b2", ""), "CE-LoRA": ("#d55e00", "6 4")}


def slopes() -> str:
    """Mean squared gradient by number of steps, and the slopes."""
    found = rows.read(study.RESULTS)
    body = []
    for arm in study.RATED:
        mean, width = study.slope(found, arm)
        cells = [f"{_squared(found, arm, steps):.4f}" for steps in study.STEPS]
        body.append([arm, *cells, f"{mean:.3f} ({mean - width:.3f} to {mean + width:.3f})"])
    seeds = len({row["seed"] for row in found})
    return (
        rows.markdown(["", *(f"T = {steps:,}" for steps in study.STEPS), "slope (95 %)"], body)
        + f"\n\nMean over {seeds} seeds of the average squared norm of the whole gradient; O(1/sqrt(T)) is -0.5. "
        f"{'; '.join(dict.fromkeys(rows.where(row) for row in found))}; `fast` on the latter."
    )


def boundary() -> str:
    """Sampled columns at smaller and smaller keep ratios, without and with the guard: error and result."""
    found = [row for row in rows.read(study.RESULTS) if row["steps"] == study.BOUNDARY_STEPS]

    def reached(arm: str) -> str:
        last = [row["last_squared_gradient"] for row in found if row["arm"] == arm]
        return f"{statistics.median(last):.4f} ({min(last):.4f} to {max(last):.4f})"

    body = [["LoRA", "", reached("LoRA"), "", "", ""]]
    for arm in (arm for arm in study.ARMS if arm.startswith("sampled") and not arm.endswith(study.GUARDED)):
        alone, guarded = ([row for row in found if row["arm"] == name] for name in (arm, arm + study.GUARDED))
        exact = [row["made_exact"] for row in guarded]
        body.append(
            [
                arm,
                f"{statistics.median(row['relative_error'] for row in alone):.1f}",
                reached(arm),
                f"{sum(row['monitor'] for row in alone)} of {len(alone)}",
                reached(arm + study.GUARDED),
                f"{statistics.median(exact):g} ({min(exact)} to {max(exact)})",
            ]
        )
    header = [
        "",
        "worst layer's relative error at the end",
        "squared gradient at the end",
        "runs warned of",
        "the same, guarded",
        f"layers made exact, of {study.DEPTH}",
    ]
    return rows.markdown(header, body) + f"\n\nT = {study.BOUNDARY_STEPS:,}; median over seeds (and range)."


def picture() -> str:
    """Mean squared gradient against T, both on logarithmic axes, with the rate of the theorem."""
    found = rows.read(study.RESULTS)
    width, height, left, right, top, bottom = 640, 360, 70, 120, 20, 60
    low, high = -2.0, 0.0

    def at(steps: float, value: float) -> tuple[float, float]:
        x = (math.log10(steps) - 1.6) / (4.4 - 1.6)
        y = (high - math.log10(value)) / (high - low)
        return left + x * (width - left - right), top + y * (height - top - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for steps in (100, 1000, 10000):
        x, y = at(steps, 10**low)
        parts.append(f'<line x1="{x:.0f}" y1="{top}" x2="{x:.0f}" y2="{y:.0f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.0f}" y="{y + 18:.0f}" text-anchor="middle">{steps:,}</text>')
    for value in (0.01, 0.1, 1.0):
        (x, y), end = at(10**1.6, value), at(10**4.4, value)[0]
        parts.append(f'<line x1="{x:.0f}" y1="{y:.0f}" x2="{end:.0f}" y2="{y:.0f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 8:.0f}" y="{y + 4:.0f}" text-anchor="end">{value:g}</text>')
    x, y = at(1000, 10**low)
    parts.append(f'<text x="{x:.0f}" y="{y + 40:.0f}" text-anchor="middle">T, optimizer steps</text>')
    middle = (top + height - bottom) / 2
    parts.append(
        f'<text x="18" y="{middle:.0f}" text-anchor="middle" transform="rotate(-90 18 {middle:.0f})">'
        "mean of ||gradient||² over the T steps</text>"
    )
    first = study.STEPS[0]
    start = _squared(found, "LoRA", first)
    (x1, y1), (x2, y2) = at(first, start), at(study.STEPS[-1], start * (first / study.STEPS[-1]) ** 0.5)
    parts.append(
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#555" stroke-dasharray="2 4"/>'
        f'<text x="{x2 + 8:.0f}" y="{y2 - 4:.0f}" fill="#555">1/√T</text>'
    )
    for i, (arm, (colour, dash)) in enumerate(_LINES.items()):
        points = [at(steps, _squared(found, arm, steps)) for steps in study.STEPS]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        )
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{4 - i}" fill="{colour}"/>' for x, y in points]
        y = top + 14 + 20 * i
        parts.append(
            f'<line x1="{width - 115}" y1="{y - 4}" x2="{width - 85}" y2="{y - 4}" stroke="{colour}" stroke-width="2" '
            f'stroke-dasharray="{dash}"/><text x="{width - 78}" y="{y}">{arm}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def _squared(found: Sequence[dict[str, Any]], arm: str, steps: int) -> float:
    return statistics.fmean(row["mean_squared_gradient"] for row in found if (row["arm"], row["steps"]) == (arm, steps))


TABLES = {"convergence": slopes, "boundary": boundary}
PICTURES = {"convergence.svg": picture}
