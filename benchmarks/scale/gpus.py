"""What `celora estimate --gpu` says that fits on GPUs of each size: Llama 1B, 3B and 8B, rows of 512 tokens.

`python -m benchmarks.scale.gpus` writes the rows. Bytes are counted on the CPU, and nothing runs on a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from benchmarks import rows
from benchmarks.kernels.gpu import MODELS
from celora.studies.assets import demo_model
from celora.studies.cells import Llama

RESULTS = Path(__file__).with_name("gpus.jsonl")
FIELDS = ("model", "base", "preset", "checkpointing")
GPU, BATCH, LENGTH, ROWS, RANK = "RTX 4090", 4, 512, 64, 16


def make_inputs(shape: Llama, folder: Path) -> list[str]:
    """Arguments of a model of this shape, without weights, and of rows that are longer than a row may be."""
    config = shape.config()
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo_model()).save_pretrained(folder)
    save_file({"model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16)}, folder / "model.safetensors")
    data = folder / "rows.jsonl"
    data.write_text(ROWS * (json.dumps({"text": "the cat sat on the mat " * LENGTH}) + "\n"), encoding="utf-8")
    return ["--model", str(folder), "--data", str(data), "--max_length", str(LENGTH)]


def estimated(shape: Llama) -> list[dict[str, Any]]:
    """What is said of each way."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "celora",
            "estimate",
            *make_inputs(shape, Path(folder)),
            "--gpu",
            GPU,
            "--json",
        ]
        command += ["--per_device_train_batch_size", str(BATCH), "--lora_r", str(RANK)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 2):  # 2: nothing fits
        raise SystemExit(done.returncode)
    ways: list[dict[str, Any]] = json.loads(done.stdout)["ways"]
    return ways


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = []
    for model, shape in MODELS.items():
        for way in estimated(shape):
            own = {name: way[name] for name in (*FIELDS[1:], "peak_bytes", "smallest_gpu_gb")}
            found.append(
                {"model": model}
                | own
                | {"batch": BATCH, "length": LENGTH, "rank": RANK}
                | rows.conditions(way["preset"])
            )
            print(*own.values())
    rows.replace(RESULTS, found, FIELDS)


if __name__ == "__main__":
    main()
