"""The backward of frozen quantised layers: their own, as in plain QLoRA, in turns with celora's estimates.

`python -m benchmarks.kernels.quantised` writes `quantised.jsonl`; `--quick` prints one shape. Layers are NF4 with
nested scales and bfloat16 activations. There are two measurements:

- one frozen layer: its backward through autograd, and the memory that it allocates;
- a stack of four layers with PEFT's LoRA (r = 16, float32 adapters, PEFT's default): its backward, and the peak memory
  of a forward and backward, with what is saved between the two and what estimators keep from step to step.

`python -m benchmarks.kernels.quantised --kinds` measures one layer of every kind of quantisation, 2048 x 2048, in the
dtype that is faster here, and writes `quantised-kinds.jsonl`. Its memory is that of a forward and backward with all
that is kept, because some kinds keep the de-quantised weight between the two. GGUF is missing: such layers are
unpacked.

The profiler counts every allocation, so memory is exact and repeatable.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import celora
from benchmarks import rows
from celora.machine.allocator import keep_freed_memory
from celora.machine.timing import faster_dtype, interleaved
from celora.modeling.graft import LayerGraft
from celora.modeling.switch import Mode, Switch
from celora.numerics.estimators import make_estimator
from celora.runtime.attachment import Attachment, find
from celora.weights.read import read

sys.path.append(str(Path(__file__).parents[2] / "tests" / "helpers"))
import layers

SHAPES = [(576, 1536), (2048, 2048), (4096, 4096)]
LAYERS = 4
KINDS = {
    "bitsandbytes 4-bit nested": "bitsandbytes", "bitsandbytes 8-bit": "bitsandbytes",
    "torchao int8": "torchao", "torchao int4": "torchao", "HQQ 8-bit": "hqq", "HQQ 4-bit": "hqq",
}  # fmt: skip
PLAIN = "plain 4-bit LoRA"
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {"estimator": "dense"},
    "columns 0.5": {"estimator": "columns", "keep_ratio": 0.5},
    "columns 0.25": {"estimator": "columns", "keep_ratio": 0.25},
    "tokens 0.6": {"estimator": "tokens", "keep_ratio": 0.6},
    "int8": {"estimator": "int8"},
    "int8, no copy": {"estimator": "int8", "weight_copy": False},
    "int8 x tokens 0.6": {"estimator": "tokens", "keep_ratio": 0.6, "precision": "int8"},
    "int8 x tokens 0.6, no copy": {
        "estimator": "tokens", "keep_ratio": 0.6, "precision": "int8", "weight_copy": False,
    },
}  # fmt: skip


def make_layer(out: int, inp: int) -> nn.Module:
    """A frozen NF4 layer, the same weights for the same shape."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(out, inp, generator=generator) / inp**0.5).to(torch.bfloat16)
    layer = Linear4bit(inp, out, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
    return layer.to("cpu")


def uneven(tokens: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A random gradient like real ones: few tokens and few columns carry most of the norm."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.randn(tokens, 1, generator=generator).exp() * torch.randn(1, width, generator=generator).exp()
    return (scale * torch.randn(tokens, width, generator=generator)).to(dtype)


def allocated(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes that a call leaves allocated besides its result, and its peak."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = call()
        del result
    total = most = 0
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return max(0, total), most


def backward_of(module: nn.Module, x: Tensor, grad_output: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A function that repeats the backward of one forward."""
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    y = module(x)
    return lambda: torch.autograd.grad(y, wanted, grad_output, retain_graph=True)


def one_layer(
    make: Callable[[], nn.Module], out: int, inp: int, tokens: int, repeats: int, dtype: torch.dtype = torch.bfloat16
) -> list[dict[str, Any]]:
    """Rows of the frozen layer alone, plain first."""
    x = torch.ones(tokens, inp, dtype=dtype, requires_grad=True)
    grad_output = uneven(tokens, out, dtype)
    modules = {PLAIN: make()}
    calls = {PLAIN: backward_of(modules[PLAIN], x, grad_output)}
    exact = calls[PLAIN]()[0].float()
    kept = {PLAIN: 0}
    for name, settings in SETTINGS.items():
        layer = make()
        estimator = make_estimator(settings["estimator"], out, inp, settings)
        weight = read(layer, dtype)
        estimator.observe(grad_output, weight, grad_output @ weight.detach())
        estimator.select()
        graft = LayerGraft(estimator, Switch())
        graft.mode = Mode.ESTIMATE
        graft.under(layer)
        modules[name] = layer
        calls[name] = backward_of(layer, x, grad_output)
        kept[name] = allocated(calls[name])[0]
    found = []
    for name, times in interleaved(calls, repeats=repeats).items():
        error = torch.linalg.vector_norm(calls[name]()[0].float() - exact) / torch.linalg.vector_norm(exact)
        memory = {"kept_bytes": kept[name], "peak_bytes": allocated(calls[name])[1]}
        step = allocated(lambda name=name: torch.autograd.grad(modules[name](x), x, grad_output))
        memory["step_bytes"] = kept[name] + step[1]
        found.append({"what": "layer", "estimator": name, **times, **memory, "relative_error": round(float(error), 5)})
    return found


def first_steps(step: Callable[[], None], attachment: Attachment | None) -> None:
    """Take a refresh step, if the estimator needs one, and one ordinary step."""
    if attachment is not None:
        step()
        for graft in attachment.grafts.values():
            graft.estimator.select()
        attachment.set_modes(1)
    step()


def stack(out: int, inp: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of four layers with LoRA, alternating between the two widths, plain first."""
    x = torch.ones(tokens, inp, dtype=torch.bfloat16, requires_grad=True)
    grad_output = uneven(tokens, inp)
    calls, peaks, kept = {}, {}, {}
    for name in (PLAIN, *SETTINGS):
        torch.manual_seed(2)
        model = nn.Sequential(*(make_layer(*((inp, out) if i % 2 else (out, inp))) for i in range(LAYERS)))
        model.is_loaded_in_4bit = True
        model = get_peft_model(model, LoraConfig(r=16, target_modules=r"\d+", init_lora_weights=False))
        if name in SETTINGS:
            celora.attach(model, celora.CELoraConfig(**{"rank": 0, "fused": True, **SETTINGS[name]}))
        wanted = [x, *(p for p in model.parameters() if p.requires_grad)]

        def step(model: nn.Module = model, wanted: list[Tensor] = wanted) -> None:
            torch.autograd.grad(model(x), wanted, grad_output)

        gc.collect()
        kept[name] = allocated(functools.partial(first_steps, step, find(model)))[0]
        peaks[name] = kept[name] + allocated(step)[1]
        calls[name] = backward_of(model, x, grad_output)
    return [
        {"what": "stack", "estimator": name, **times, "kept_bytes": kept[name], "peak_bytes": peaks[name]}
        for name, times in interleaved(calls, repeats=repeats).items()
    ]


def measure(out: int, inp: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """All rows of one shape."""
    found = []
    make = functools.partial(make_layer, out, inp)
    for measured in (one_layer(make, out, inp, tokens, repeats), stack(out, inp, tokens, max(3, repeats // 3))):
        found += relative(measured, {"out": out, "in": inp, "tokens": tokens})
        gc.collect()
    return found


def relative(measured: list[dict[str, Any]], given: dict[str, Any], peak: str = "peak_bytes") -> list[dict[str, Any]]:
    """The rows with these fields added, and with speed and memory relative to the first row."""
    return [
        {
            **given,
            **row,
            "speed_up": round(measured[0]["time_ms"] / row["time_ms"], 3),
            "memory": round(row[peak] / measured[0][peak], 3),
        }
        for row in measured
    ]


def kinds(tokens: int, repeats: int, size: int = 2048) -> list[dict[str, Any]]:
    """Rows of one layer of each kind, with the version of the package that it is from."""
    found = []
    dtype = faster_dtype()
    for kind, package in KINDS.items():
        make = functools.partial(layers.make_layer, kind, size, size, getattr(torch, dtype))
        measured = one_layer(make, size, size, tokens, repeats, getattr(torch, dtype))
        given = {"kind": kind, "dtype": dtype, "out": size, "in": size, "tokens": tokens}
        found += relative(measured, given | {"package": f"{package} {metadata.version(package)}"}, "step_bytes")
        gc.collect()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--quick", action="store_true", help="one shape, few repeats, nothing written")
    parser.add_argument("--kinds", action="store_true", help="one layer of every kind of quantisation instead")
    options = parser.parse_args()
    keep_freed_memory()
    if options.kinds:
        found = [row | rows.conditions() for row in kinds(options.tokens, 5 if options.quick else 15)]
        for row in found:
            print(f"{row['kind']:26} {row['estimator']:28} {row['time_ms']:8.2f} ms  {row['speed_up']:6.2f} x  "
                  f"{row['memory']:5.2f} x  error {row['relative_error']:.3f}")  # fmt: skip
        if not options.quick:
            rows.write(Path(__file__).with_name("quantised-kinds.jsonl"), found)
        return
    versions = {"bitsandbytes": bitsandbytes.__version__}
    found = [
        row | versions | rows.conditions()
        for out, inp in (SHAPES[:1] if options.quick else SHAPES)
        for row in measure(out, inp, options.tokens, 5 if options.quick else 15)
    ]
    for row in found:
        shape = f"{row['what']} {row['out']} x {row['in']}"
        print(f"{shape:20} {row['estimator']:28} {row['time_ms']:8.2f} ms  {row['speed_up']:6.2f} x  "
              f"{row['peak_bytes'] / 2**20:8.1f} MiB  {row['memory']:5.2f} x")  # fmt: skip
    if options.quick:
        return
    rows.write(Path(__file__).with_name("quantised.jsonl"), found)


if __name__ == "__main__":
    main()
