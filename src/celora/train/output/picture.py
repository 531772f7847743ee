"""Draws the losses of a run as an SVG picture for its model card. Browsers and the hub show it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_LINES = (
    ("loss", "training loss", "#0072B2"),
    ("eval_loss", "evaluation loss", "#D55E00"),
    ("eval_base_loss", "the same on the original base", "#009E73"),
)
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 260, 52, 628, 30, 228


def loss_picture(history: Sequence[Mapping[str, Any]]) -> str:
    """The finite losses in Trainer's `log_history` by optimizer step, as SVG; '' if no loss was logged twice."""
    curves = {
        key: [(row["step"], float(row[key])) for row in history if key in row and math.isfinite(row[key])]
        for key, _, _ in _LINES
    }
    points = [point for curve in curves.values() for point in curve]
    if max(map(len, curves.values())) < 2:
        return ""
    (first, last), (low, high) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))

    def place(step: float, loss: float) -> str:
        x = _LEFT + (_RIGHT - _LEFT) * (step - first) / max(1, last - first)
        y = _BOTTOM - (_BOTTOM - _TOP) * (loss - low) / ((high - low) or 1.0)
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        f'<path d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}" fill="none" stroke="#999"/>',
        f'<g fill="#222"><text x="{_LEFT - 6}" y="{_TOP + 8}" text-anchor="end">{high:.3g}</text>',
        f'<text x="{_LEFT - 6}" y="{_BOTTOM}" text-anchor="end">{low:.3g}</text>',
        f'<text x="{_LEFT}" y="{_BOTTOM + 18}">step {first:,}</text>',
        f'<text x="{_RIGHT}" y="{_BOTTOM + 18}" text-anchor="end">{last:,}</text></g>',
    ]
    for i, (key, name, colour) in enumerate(_LINES):
        if curve := curves[key]:
            line = " ".join(place(*point) for point in curve)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts.append(f'<text x="{_LEFT + 140 * i}" y="18" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])
