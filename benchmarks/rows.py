"""What all benchmarks share: rows that record their conditions, and Markdown tables of rows."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import celora
from celora.files import write_text
from celora.machine import cpu as kernels
from celora.machine.device import device_name
from celora.settings.config import CELoraConfig
from celora.settings.presets import PRESETS, by_rule

UNPACKED = "weights unpacked from 4 bits"  # said of the demo's model, which comes as a Q4_1 file


def conditions(arm: str = "") -> dict[str, Any]:
    """Date, commit, machine and versions of this measurement; and what the preset of this arm asks for."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "cpu": device_name(torch.device("cpu")),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "celora": celora.__version__,
        "amx": kernels.matrix_instructions(),
        **({"onednn_max_cpu_isa": limit} if (limit := os.environ.get("ONEDNN_MAX_CPU_ISA")) else {}),
        **({"defaults": asked} if (asked := defaults(arm)) else {}),
    }


def defaults(arm: str) -> dict[str, Any]:
    """What the preset of an arm asks for: the fields that are not CELoraConfig's own defaults. Empty without a preset.

    A page shows no row whose defaults are not those of the code: a test compares them.
    """
    preset = re.sub(r", \d+ steps' time$", "", arm.removeprefix("preset "))
    for beside in (", Adam", " + compile", ", base int8"):
        preset = preset.removesuffix(beside)
    if preset not in PRESETS or preset == "off":
        return {}
    config = PRESETS[preset] if preset != "auto" else by_rule(PRESETS["auto"])
    plain = CELoraConfig().to_dict()
    asked: dict[str, Any] = json.loads(json.dumps(config.to_dict()))  # as a row has it
    return {name: value for name, value in asked.items() if value != plain.get(name)}


def where(row: Mapping[str, Any]) -> str:
    """The machine of a row, in words. Older rows do not say whether it had matrix instructions."""
    threads = "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
    limit = row.get("onednn_max_cpu_isa")
    about = " with AMX" if row.get("amx") else f" up to {limit}" if limit else ""
    return f"{row['cpu']}{about}, {threads}, torch {row['torch']}"


def on_gpu(row: Mapping[str, Any]) -> str:
    """The GPU of a row, in words."""
    return f"{row['device']}, torch {row['torch']}, commit {row['commit']}"


def machine(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What identifies the machine of a row. Rows without the field `amx` are older, and count as without AMX."""
    return row.get("cpu"), row.get("device", "cpu"), bool(row.get("amx")), row.get("onednn_max_cpu_isa")


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write all rows of a benchmark, as JSON lines, or leave the file as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row at once, so that an interrupted study can be continued."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a benchmark."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def found(path: Path) -> list[dict[str, Any]]:
    """Read the rows that a study has so far; empty before its first."""
    return read(path) if path.exists() else []


def select(path: Path, *, amx: bool, **wanted: Any) -> list[dict[str, Any]]:
    """The rows with these values, from machines with matrix instructions or from machines without."""
    return [row for row in read(path) if bool(row.get("amx")) == amx and wanted.items() <= row.items()]


def replace(path: Path, rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> None:
    """Replace earlier rows of the same machine that agree with a new row in these fields."""

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return machine(row), *(row[field] for field in fields)

    replaced = {key(row) for row in rows}
    write(path, [*(row for row in found(path) if key(row) not in replaced), *rows])


NOT_YET = "Not measured yet."  # instead of a table that has no rows


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *body])


def _commit() -> str:
    """Of this checkout, or the variable `CELORA_COMMIT` where the sources came without their history."""
    if said := os.environ.get("CELORA_COMMIT"):
        return said
    if shutil.which("git") is None:
        return "unknown"
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"
