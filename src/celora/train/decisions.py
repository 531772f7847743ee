"""What a run has decided, in words: lines for the terminal, and tables for the report.

The tables read run.json, which a user may have edited, and leave out what they cannot read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from celora.train.charts import is_number
from celora.train.request.arguments import TrainRequest


def rank_line(request: TrainRequest) -> str:
    """One line on the rank that trains, and why it differs from the rank asked for, if it does."""
    if request.r == request.lora_r:
        return f"LoRA r = {request.r}."
    return (
        f"LoRA r = frozen factor r0 = {request.r}: floor(7/8 of lora_r={request.lora_r}), so that both fit "
        f"LoRA's memory (scaling lora_alpha/r = {request.lora['lora_alpha'] / request.r:.3g})."
    )


def estimator_rows(record: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that trained.

    Layers that an override names alone are counted: the gate names up to all of them.
    """
    config = record.get("settled") or {}
    rows = {key: value for key, value in config.items() if key != "overrides"}
    named: Counter[str] = Counter()
    overrides = config.get("overrides")
    for pattern, fields in (overrides if isinstance(overrides, dict) else {}).items():
        if not isinstance(fields, dict):
            continue
        said = ", ".join(f"{key} {value}" for key, value in fields.items())
        if pattern.startswith("="):
            named[said] += 1
        else:
            rows[pattern] = said
    return rows | {f"layers with {said}": count for said, count in named.items()}


def decision_rows(record: Mapping[str, Any]) -> dict[str, str]:
    """What was decided, and when: the times of the gate before the first step, and the moves at their steps."""
    rows: dict[str, str] = {}
    for timing in _dicts(record.get("gate")):
        over = timing.get("over_exact")
        if isinstance(over, dict) and all(map(is_number, over.values())):
            times = ", ".join(f"{setting} {ratio:.2f}" for setting, ratio in over.items())
            of = f"before the first step: {timing.get('count')} x {timing.get('layers')}, {timing.get('shape')}"
            said = f"{timing.get('chosen')} (time over exact: {times})"
            rows[of] = f"{rows[of]}; {said}" if of in rows else said  # kinds may differ in their dtype only
    moved: dict[int, Counter[str]] = {}
    for move in _dicts(record.get("moves")):
        if is_number(move.get("step")) and is_number(move.get("keeps")):
            part = str(move.get("layer")).rpartition(".")[2]
            then = "exact" if move["keeps"] == 1 else f"keeps {move['keeps']:g}"
            moved.setdefault(move["step"], Counter())[f"{part} {then}"] += 1
    for step, counts in moved.items():
        rows[f"from step {step} on"] = ", ".join(f"{count} x {what}" for what, count in counts.items())
    return rows


def _dicts(values: Any) -> Iterator[dict[str, Any]]:
    return (value for value in (values if isinstance(values, list) else ()) if isinstance(value, dict))
