"""Peak memory of LoRA on a base in its own dtype, and on a base in 8 bits (`--base int8`).

Each arm is a process of its own that loads a random Llama from a folder, adds an adapter and takes a few steps.
`python -m benchmarks.scale.memory` measures hidden 2048 with 16 blocks; `--hidden 512 --blocks 4` is a quick look.
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
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import celora
from benchmarks import rows
from celora.machine.allocator import keep_freed_memory
from celora.machine.memory import forget_peak, peak_memory
from celora.studies.step import Step
from celora.train.int8_loading import load_int8_model

RESULTS = Path(__file__).with_name("memory.jsonl")
ARMS = ("PEFT", "exact", "fast", "fast, base int8")
DTYPES = ("float32", "bfloat16")
FIELDS = ("arm", "dtype", "hidden", "blocks", "vocabulary", "rows", "length")
_CPU, _STEPS, _MIB = torch.device("cpu"), 3, 2**20


def make_checkpoint(folder: str, given: argparse.Namespace) -> None:
    """A random Llama with 8/3 as many intermediate numbers, in files of at most a gigabyte."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=given.hidden,
        intermediate_size=-(-given.hidden * 8 // 3 // 64) * 64,
        num_hidden_layers=given.blocks,
        num_attention_heads=given.hidden // 64,
        vocab_size=given.vocabulary,
        dtype=given.dtype,
        use_cache=False,
    )
    with torch.device("cpu"):
        torch.set_default_dtype(getattr(torch, given.dtype))
        LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1GB")


def measure(folder: str, given: argparse.Namespace) -> dict[str, Any]:
    """The memory of one arm, in MiB: at its peak while it is loaded, and in all."""
    held = given.arm.endswith("base int8")
    keep_freed_memory()
    forget_peak(_CPU)
    before = _resident()
    if held:
        base = load_int8_model(folder, revision=None, dtype=given.dtype, attention=None, settings={})
    else:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=given.dtype)
    loading = (peak_memory(_CPU) or 0) / _MIB - before
    row = {"base_mib": _size(base), "largest_tensor_mib": max(p.nbytes for p in base.parameters()) / _MIB}
    model: Any = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    if given.arm != "PEFT":
        celora.attach(model, given.arm.partition(",")[0])
    tokens = torch.randint(given.vocabulary, (given.rows, given.length))
    with tempfile.TemporaryDirectory() as output:
        step = Step(model, Path(output))
        for _ in range(_STEPS):
            step({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()})
    return row | {"before_mib": before, "loading_mib": loading, "peak_mib": (peak_memory(_CPU) or 0) / _MIB}


def _size(model: nn.Module) -> float:
    return sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()}) / _MIB


def _resident() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("hidden", 2048), ("blocks", 16), ("vocabulary", 32000), ("rows", 4), ("length", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=DTYPES, help="one of them only")
    parser.add_argument("--arm", choices=ARMS, help="one of them only")
    parser.add_argument("--keep", action="store_true", help=f"write the rows to {RESULTS.name}")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder:  # a process of this script's own
        found = make_checkpoint(given.folder, given) if given.arm is None else measure(given.folder, given)
        print(json.dumps(found))
        return
    shape = [f"--{name}={getattr(given, name)}" for name in FIELDS[2:]]
    measured: list[dict[str, Any]] = []
    for dtype in [given.dtype] if given.dtype else DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            common = [sys.executable, "-m", "benchmarks.scale.memory", "--folder", folder, f"--dtype={dtype}", *shape]
            subprocess.run(common, check=True, stdout=subprocess.DEVNULL)
            for arm in [given.arm] if given.arm else ARMS:
                done = subprocess.run([*common, f"--arm={arm}"], check=True, stdout=subprocess.PIPE, text=True)
                own = {name: getattr(given, name) for name in FIELDS[2:]} | {"arm": arm, "dtype": dtype}
                measured.append(own | json.loads(done.stdout.splitlines()[-1]) | rows.conditions(arm))
                _say(measured)
    if given.keep:
        rows.replace(RESULTS, measured, FIELDS)


def _say(measured: list[dict[str, Any]]) -> None:
    row = measured[-1]
    plain = next((r for r in measured if r["arm"] == "PEFT" and r["dtype"] == row["dtype"]), row)
    over = row["loading_mib"] - row["base_mib"]
    print(f"{row['dtype']:9} {row['arm']:16} base {row['base_mib']:7.0f} MiB, loading {over:+7.0f} MiB over it "
          f"(largest tensor {row['largest_tensor_mib']:.0f}), peak {row['peak_mib']:7.0f} MiB, "
          f"{row['peak_mib'] / plain['peak_mib']:.2f} of PEFT's")  # fmt: skip


if __name__ == "__main__":
    main()
