"""`celora doctor`: what this machine has, and what will be fast on it by a measurement of about a second.

Whether bfloat16 or 8-bit arithmetic pays cannot be read off a list of CPU features: it is timed, on the product that
celora estimates. `examine` gathers, `advise` concludes, `describe` prints.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

from celora import kernels
from celora.memory import available_memory
from celora.plan import device_name
from celora.products import make_product
from celora.timing import interleaved
from celora.train.threads import allowed_cpus

PACKAGES = ("celora", "torch", "transformers", "peft", "trl", "accelerate", "datasets")
OPTIONAL = ("bitsandbytes", "torchao", "deepspeed", "tensorboard", "trackio", "wandb")
_SHAPES = {"cpu": (1024, 1024, 1024), "cuda": (4096, 4096, 4096)}  # tokens, out, in: a second's worth of products
_REPEATS = 15
_FASTER = 0.95  # of the other's time; closer ones may change places the next time


def examine() -> dict[str, Any]:
    """Everything `celora doctor --json` prints: plain values only."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free = available_memory(device)
    found = {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in (*PACKAGES, *OPTIONAL)},
        "device": {
            "type": device.type,
            "name": device_name(device),
            "free_memory_mib": None if free is None else free // 2**20,
        },
        "cpu": {
            "count": os.cpu_count(),
            "quota": allowed_cpus(),
            "threads": torch.get_num_threads(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "instructions": _instructions(),
        "kernels": {"built": kernels.library() is not None, "why_not": kernels.why_not()},
        "products": _products(device),
    }
    return found | {"advice": advise(found)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _instructions() -> dict[str, bool]:
    """What torch finds on an x86 CPU, and may use; all false on others."""
    found = {name: kernels.cpu_supports(name) for name in ("avx2", "avx512", "avx512_bf16", "vnni")}
    return found | {"amx": kernels.matrix_instructions()}


def _products(device: torch.device) -> dict[str, Any]:
    """`grad_output @ W` in each dtype, dense and in 8 bits: milliseconds, medians of a few, taking turns."""
    tokens, out_features, in_features = _SHAPES[device.type]
    formats = ("int8", "fp8") if device.type == "cuda" else ("int8",)
    why_not = {
        name: make_product(name).unavailable(out_features, in_features, device) or make_product(name).slow(device)
        for name in formats
    }
    generator = torch.Generator(device).manual_seed(0)
    contenders = {}
    for dtype in (torch.float32, torch.bfloat16):
        of = str(dtype).removeprefix("torch.")
        g = torch.randn(tokens, out_features, device=device, generator=generator).to(dtype)
        w = torch.randn(out_features, in_features, device=device, generator=generator).to(dtype)
        for name in ("native", *(name for name, reason in why_not.items() if not reason)):
            product = make_product(name)
            contenders[f"{of} {name}"] = lambda product=product, g=g, w=w: product(g, w)
    times = {name: found["time_ms"] for name, found in interleaved(contenders, repeats=_REPEATS).items()}
    return {
        "shape": [tokens, out_features, in_features],
        "time_ms": times,
        "unavailable": {name: reason for name, reason in why_not.items() if reason},
    }


def advise(found: dict[str, Any]) -> list[str]:
    """What follows from `examine`'s findings, a sentence each."""
    lines, times, cpu = [], found["products"]["time_ms"], found["cpu"]
    half, single = times["bfloat16 native"], times["float32 native"]
    dtype, then = "bfloat16", "keep models in bfloat16"
    if single < _FASTER * half:
        dtype, then = "float32", "train with --dtype float32"
    elif half >= _FASTER * single:
        then += ", which takes half the memory"
    lines.append(f"bfloat16 products take {half / single:.2f} of float32's time: {then}.")
    for name in ("int8", "fp8"):
        if (time := times.get(f"{dtype} {name}")) is not None:
            ratio = time / times[f"{dtype} native"]
            then = "preset auto can use them" if ratio < _FASTER else "preset auto will leave them alone"
            lines.append(f"{name} products take {ratio:.2f} of {dtype}'s time, everything included: {then}.")
        elif reason := found["products"]["unavailable"].get(name):
            lines.append(f"No {name} products: {reason}.")
    if found["device"]["type"] == "cpu":
        if found["instructions"]["amx"]:
            lines.append(
                "This CPU has matrix instructions (AMX), so the product that estimates save is a small part of a step: "
                "preset exact gives most of what there is to gain."
            )
        lines += _about_cpu(found["kernels"], cpu)
    return lines


def _about_cpu(built: dict[str, Any], cpu: dict[str, Any]) -> list[str]:
    lines = []
    if not built["built"]:
        lines.append(
            f"The C kernels are not there ({built['why_not']}): the passes around 8-bit products, the choice of tokens "
            "and the head's softmax take torch's operators, which are slower."
        )
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


def describe(found: dict[str, Any]) -> str:
    """The findings as text."""
    device, cpu, products = found["device"], found["cpu"], found["products"]
    free = device["free_memory_mib"]
    quota = "no container quota" if cpu["quota"] is None else f"container quota {cpu['quota']}"
    tokens, out_features, in_features = products["shape"]
    rows = {
        "versions": ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version),
        "not installed": ", ".join(name for name, version in found["versions"].items() if not version),
        "device": f"{device['type']}: {device['name']}" + ("" if free is None else f", {free} MiB free"),
        "threads": f"{cpu['threads']} of torch, {cpu['count']} CPUs, {quota}",
        "instructions": ", ".join(name for name, has in found["instructions"].items() if has) or "none of those known",
        "C kernels": "built" if found["kernels"]["built"] else f"not built: {found['kernels']['why_not']}",
        "products": f"({tokens} x {out_features}) @ ({out_features} x {in_features}): "
        + ", ".join(f"{name} {time:.3g} ms" for name, time in products["time_ms"].items()),
    }
    width = max(map(len, rows)) + 2
    lines = [f"{name:<{width}}{text}" for name, text in rows.items() if text]
    return "\n".join([*lines, "", "What will be fast here:", *(f"- {line}" for line in found["advice"])])
