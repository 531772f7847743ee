"""What all benchmarks share: rows that say where and on what they were measured, and the form of a table of them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from celora.machine import cpu as kernels
from celora.machine.device import device_name

RESULTS = Path(__file__).parent / "results"


def conditions() -> dict[str, Any]:
    """Commit, machine and versions of this measurement."""
    return {
        "commit": _commit(),
        "cpu": device_name(torch.device("cpu")),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "celora": metadata.version("celora"),
        "amx": kernels.matrix_instructions(),
        **({"onednn_max_cpu_isa": limit} if (limit := os.environ.get("ONEDNN_MAX_CPU_ISA")) else {}),
    }


def where(row: Mapping[str, Any]) -> str:
    """The machine of a row, in words; rows do not always say whether there were matrix instructions."""
    threads = "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
    limit = row.get("onednn_max_cpu_isa")
    about = " with AMX" if row.get("amx") else f" up to {limit}" if limit else ""
    return f"{row['cpu']}{about}, {threads}, torch {row['torch']}"


def file_for(study: str, dtype: str, found: Sequence[Mapping[str, Any]]) -> Path:
    """Where these rows of a study belong: those with matrix instructions in a file of their own."""
    return RESULTS / f"{study}-{dtype}{'-amx' if found[0]['amx'] else ''}.jsonl"


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the rows of a benchmark: JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row: a study that keeps each as it is found can be interrupted and gone on with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a benchmark."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def found(path: Path) -> list[dict[str, Any]]:
    """The rows that a study has so far, none before it began."""
    return read(path) if path.exists() else []


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table as Markdown has it."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *body])


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"
