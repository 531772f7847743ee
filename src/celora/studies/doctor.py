"""`celora doctor`: says what this machine has, what will be fast on it, and what to run.

A list of CPU features does not tell whether bfloat16 or 8-bit arithmetic is faster. So doctor times the product that
celora estimates, for about a second. `examine` gathers facts, `advise` and `commands` draw conclusions, `describe`
prints.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from typing import Any

import torch

from celora.kernels.backends import chosen, explain
from celora.kernels.c import tier
from celora.machine import cpu
from celora.machine.cgroup import allowed_cpus
from celora.machine.device import default_device, device_name
from celora.machine.memory import available_memory
from celora.machine.packages import PACKAGES, package_version
from celora.machine.timing import faster_dtype, interleaved, time_over_float32
from celora.numerics.products.registry import make_product

OPTIONAL = ("bitsandbytes", "torchao", "deepspeed", "tensorboard", "trackio", "wandb")
_SHAPES = {"cpu": (1024, 1024, 1024)}  # tokens, out, in: a second's worth of products
_ACCELERATOR_SHAPE = (4096, 4096, 4096)
_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SAID = {
    "ONEDNN_MAX_CPU_ISA": "ONEDNN_MAX_CPU_ISA keeps oneDNN, which multiplies matrices, from newer instructions: "
    "unset it unless that is meant.",
    "ATEN_CPU_CAPABILITY": "ATEN_CPU_CAPABILITY keeps torch's own operators from newer instructions: unset it unless "
    "that is meant.",
}
_REPEATS = 15
_FASTER = 0.95  # "faster" means at most this share of the other's time; closer times may swap in another run


def examine() -> dict[str, Any]:
    """All facts, as plain values: the output of `celora doctor --json`."""
    device = default_device()
    free, ratio = available_memory(device), time_over_float32(torch.bfloat16, device)
    found: dict[str, Any] = {
        "versions": {"python": platform.python_version()}
        | {name: package_version(name) for name in (*PACKAGES, *OPTIONAL)},
        "device": {
            "type": device.type,
            "name": device_name(device),
            "free_memory_mib": None if free is None else free // 2**20,
        },
        "system": {"name": platform.system(), "release": platform.release(), "architecture": platform.machine()},
        "cpu": {
            "name": cpu.cpu_name(),
            "count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "quota": allowed_cpus(),
            "threads": torch.get_num_threads(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "instructions": _instructions(),
        "limits": cpu.limits(),
        "kernels": {
            "built": not tier.why_not(),
            "tier": tier.why_this(),
            "why_not": tier.why_not(),
            "why_not_kept": tier.why_not_kept(),
            "chosen": chosen(torch.float32, device),
        },
        "products": _products(device, (torch.float32, torch.bfloat16) if math.isfinite(ratio) else (torch.float32,)),
        "dtype": {
            "bfloat16_over_float32": round(ratio, 3) if math.isfinite(ratio) else None,
            "trains_in": faster_dtype(),
        },
    }
    found["advice"] = advise(found)
    return found | {"commands": commands(found)}


def _instructions() -> dict[str, bool]:
    """Which instruction sets the CPU has. `amx` also needs oneDNN's permission to use it."""
    has = cpu.features()
    return {name: has[name] for name in has if name != "amx_tile"} | {"amx": cpu.matrix_instructions()}


def _products(device: torch.device, dtypes: Sequence[torch.dtype]) -> dict[str, Any]:
    """Times `grad_output @ W` in each dtype, dense and in 8 bits, in turns. Median milliseconds."""
    tokens, out_features, in_features = _SHAPES.get(device.type, _ACCELERATOR_SHAPE)
    formats = ("int8", "fp8") if device.type == "cuda" else ("int8",)
    why_not = {
        name: make_product(name).unavailable(out_features, in_features, device) or make_product(name).slow(device)
        for name in formats
    }
    generator = torch.Generator(device).manual_seed(0)
    contenders = {}
    for dtype in dtypes:
        kind = str(dtype).removeprefix("torch.")
        g = torch.randn(tokens, out_features, device=device, generator=generator).to(dtype)
        w = torch.randn(out_features, in_features, device=device, generator=generator).to(dtype)
        for name in ("native", *(name for name, reason in why_not.items() if not reason)):
            product = make_product(name)
            contenders[f"{kind} {name}"] = lambda product=product, g=g, w=w: product(g, w)
    times = {name: found["time_ms"] for name, found in interleaved(contenders, repeats=_REPEATS, device=device).items()}
    return {
        "shape": [tokens, out_features, in_features],
        "time_ms": times,
        "unavailable": {name: reason for name, reason in why_not.items() if reason},
        "int8_path": explain("pack_weight", device),
    }


def advise(found: dict[str, Any]) -> list[str]:
    """Advice that follows from the findings of `examine`, one sentence each."""
    lines, times = [], found["products"]["time_ms"]
    dtype, ratio = found["dtype"]["trains_in"], found["dtype"]["bfloat16_over_float32"]
    then = f"celora trains a bfloat16 checkpoint in {dtype}"
    if dtype == "bfloat16" and ratio >= _FASTER:
        then += ", which takes half the memory"
    took = "cannot be computed" if ratio is None else f"take {ratio:.2f} of float32's time"
    lines.append(f"bfloat16 products {took} here: {then}.")
    for name in ("int8", "fp8"):
        if (time := times.get(f"{dtype} {name}")) is not None:
            ratio = time / times[f"{dtype} native"]
            preset = "auto" if found["device"]["type"] != "cuda" else "fast"  # on a GPU, auto estimates nothing
            then = f"preset {preset} {'can use them' if ratio < _FASTER else 'will leave them alone'}"
            lines.append(f"{name} products take {ratio:.2f} of {dtype}'s time, everything included: {then}.")
        elif reason := found["products"]["unavailable"].get(name):
            lines.append(f"No {name} products: {reason}.")
    if found["device"]["type"] == "cpu":
        if found["instructions"]["amx"]:
            lines.append(
                "This CPU has matrix instructions (AMX), which multiply bfloat16 fast, so estimates of the backward "
                "save little: take preset exact, or fast."
            )
        lines += _about_cpu(found["kernels"], found["cpu"])
    return lines + [text for name, text in _SAID.items() if name in found["limits"]]


def _about_cpu(built: dict[str, Any], cpu: dict[str, Any]) -> list[str]:
    lines = []
    if not built["built"]:
        lines.append(
            f"The C kernels are not there ({built['why_not']}): rounding for 8-bit products, the choice of tokens and "
            "the softmax over the vocabulary use torch's operators, which are slower."
        )
    elif built["why_not_kept"]:
        lines.append(f"Each process compiles the C kernels anew: {built['why_not_kept']}.")
    threads, quota, count, asked = (cpu[name] for name in ("threads", "quota", "count", "OMP_NUM_THREADS"))
    allowed = min(count or threads, quota or count or threads)
    if quota is not None and threads > quota:
        then = (
            "set OMP_NUM_THREADS to the quota" if asked else "celora's commands lower them; do so in your own scripts"
        )
        lines.append(f"torch uses {threads} threads, and this container may use {quota} CPUs: {then}.")
    elif asked and threads < allowed:
        lines.append(f"OMP_NUM_THREADS={asked} keeps torch on {threads} of {allowed} CPUs: unset it to use them all.")
    return lines


def commands(found: dict[str, Any]) -> list[str]:
    """Commands to run next: the demo, and a training run with the preset that suits this machine."""
    times, dtype = found["products"]["time_ms"], found["dtype"]["trains_in"]
    bits = times.get(f"{dtype} int8")
    pays = bits is not None and bits < _FASTER * times[f"{dtype} native"] and not found["instructions"]["amx"]
    preset = "" if pays or found["device"]["type"] == "cuda" else " --preset exact"
    return ["celora demo", f"celora train --model {_MODEL} --data rows.jsonl --output out{preset}"]


def describe(found: dict[str, Any]) -> str:
    """The findings as text."""
    device, cpu, products, system = found["device"], found["cpu"], found["products"], found["system"]
    free = device["free_memory_mib"]
    quota = "no container quota" if cpu["quota"] is None else f"container quota {cpu['quota']}"
    tokens, out_features, in_features = products["shape"]
    rows = {
        "versions": ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version),
        "not installed": ", ".join(name for name, version in found["versions"].items() if not version),
        "system": f"{system['name']} {system['release']}, {system['architecture']}",
        "device": f"{device['type']}: {device['name']}" + ("" if free is None else f", {free} MiB free"),
        "threads": f"{cpu['threads']} of torch, {cpu['count']} CPUs, {quota}",
        "instructions": ", ".join(name for name, has in found["instructions"].items() if has) or "none of those known",
        "limits": ", ".join(f"{name}={value}" for name, value in found["limits"].items()),
        "C kernels": found["kernels"]["tier"] or f"not built: {found['kernels']['why_not']}",
        "8-bit path": products["int8_path"],
        **_operations(found["kernels"]["chosen"]),
        "products": f"({tokens} x {out_features}) @ ({out_features} x {in_features}): "
        + ", ".join(f"{name} {time:.3g} ms" for name, time in products["time_ms"].items()),
    }
    width = max(map(len, rows)) + 2
    lines = [f"{name:<{width}}{text}" for name, text in rows.items() if text]
    lines += ["", "What will be fast here:", *(f"- {line}" for line in found["advice"])]
    lines += ["", "To see it work, and to train on rows of your own:", *(f"  {line}" for line in found["commands"])]
    return "\n".join(lines)


def _operations(chosen: dict[str, str | None]) -> dict[str, str]:
    """One row for each backend: the operations that it computes on this machine."""
    by_backend: dict[str, list[str]] = {}
    for operation, backend in chosen.items():
        by_backend.setdefault(f"by {backend}" if backend else "not available", []).append(operation)
    return {backend: ", ".join(operations) for backend, operations in sorted(by_backend.items())}
