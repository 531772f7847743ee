"""What all benchmarks share: interleaved timing, and rows that say where and on what they were measured."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(contenders: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, dict[str, float]]:
    """Time each contender `repeats` times, taking turns: name -> median and 20/80th percentile in ms.

    Taking turns spreads whatever else the machine does evenly, so ratios of medians can be trusted where the
    times themselves cannot. Two rounds warm up.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 2):
        for name, call in contenders.items():
            _synchronise()
            start = time.perf_counter()
            call()
            _synchronise()
            if turn >= 2:
                samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: _percentiles(of) for name, of in samples.items()}


def _percentiles(samples: list[float]) -> dict[str, float]:
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return {
        "time_ms": round(statistics.median(samples), 4),
        "p20_ms": round(fifths[0], 4),
        "p80_ms": round(fifths[3], 4),
    }


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def conditions() -> dict[str, Any]:
    """Commit, machine and versions of this measurement."""
    return {
        "commit": _commit(),
        "cpu": _cpu(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "celora": metadata.version("celora"),
    }


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the rows of a benchmark: JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a benchmark."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
