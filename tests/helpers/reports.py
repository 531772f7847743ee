"""Rows and runs to report on, and the charts of a page."""

from __future__ import annotations

import json
import re
from pathlib import Path

from celora.files import write_json

ROWS = [
    {"step": i, "seconds": 0.5 * i, "loss": 4.0 / i, "step_time_ms": 10.0, "celora/relative_error": 0.3}
    for i in range(1, 9)
]


def charts(page: str) -> list[dict]:
    return json.loads(re.search(r"<script type=\"application/json\" id=charts>(.*?)</script>", page, re.S)[1])


LAYERS = [
    {"name": f"model.layers.{block}.{kind}", "out_features": 8, "in_features": 8, "estimator": how, "cost": cost,
     "keep_ratio": 0.5, "rank": 0, "reason": "", "selection": "energy" if how == "tokens" else "",
     "precision": "native"}
    for block in range(3)
    for kind, how, cost in (("q_proj", "dense", 1.0), ("up_proj", "tokens", 0.6))
]  # fmt: skip


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
