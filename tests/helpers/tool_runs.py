"""Runs of other people's tools on a tiny model, without celora and with it, and the comparison of what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tiny import WORDS, save_tiny_model


def save_inputs(folder: Path) -> None:
    """A tiny model in `model`, and instructions with answers of different lengths in `rows.json`."""
    save_tiny_model(folder / "model")
    rows = [
        {
            "instruction": " ".join(WORDS[(i * 7 + j) % 40] for j in range(16 + i % 9)),
            "input": "",
            "output": " ".join(WORDS[(i * 3 + j) % 40] for j in range(12 + i % 5)),
        }
        for i in range(32)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))


def python(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS`, offline, on the CPU and with one thread."""
    offline = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "AXOLOTL_DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    own = {**os.environ, **offline, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=own, timeout=600)


def losses(folder: Path) -> list[float]:
    """The loss of every step, from the latest `trainer_state.json` in or below the folder."""
    states: list[dict[str, Any]] = [json.loads(path.read_text()) for path in folder.rglob("trainer_state.json")]
    state = max(states, key=lambda state: int(state["global_step"]))
    return [row["loss"] for row in state["log_history"] if "loss" in row]


def check_same_adapter(found: Path, expected: Path) -> None:
    """Files of the same names but celora's, the same configuration, and weights that agree to 1e-5."""
    weights, others = (load_file(folder / "adapter_model.safetensors") for folder in (found, expected))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert weight.sub(others[name]).abs().max() <= 1e-5, name
    assert max(float(weight.abs().max()) for name, weight in weights.items() if "lora_B" in name) > 1e-3  # it learnt
    first, second = (json.loads((folder / "adapter_config.json").read_text()) for folder in (found, expected))
    assert {**first, "target_modules": sorted(first["target_modules"])} == {
        **second,
        "target_modules": sorted(second["target_modules"]),
    }


def check_same_training(found: Path, expected: Path) -> None:
    """The same losses, to 1e-5, and the same adapter."""
    assert len(losses(found)) == len(losses(expected)) == 4
    assert losses(found) == pytest.approx(losses(expected), abs=1e-5)
    check_same_adapter(found, expected)


def said_by_celora(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("celora: ", "error: "))]
