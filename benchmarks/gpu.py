"""Everything that is to be measured on an NVIDIA GPU, in one command: `python -m benchmarks.gpu [--minutes 8]`.

1. Every Triton kernel against torch, in every dtype, and the attention of packed sequences in one call against a call
   each. The first that is wrong ends the program with status 1.
2. Each kernel in turns with torch's operators, and the 8-bit products with the product in bfloat16.
3. Whole training steps at the widths of Llama 1B, 3B and 8B, random weights: PEFT, Liger and Unsloth where they are
   installed, celora `exact`, `auto` and `fast`; times, memory, share of the limit.
4. How often a step of each preset waits for the GPU.

Rows go to `kernels/gpu.jsonl`, `steps/gpu.jsonl` and `steps/gpu-waits.jsonl`. Cells that would begin after `--minutes`
are left out, and named.
It was written without a GPU: nothing here has been run on one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import rows
from benchmarks.steps.step import run
from celora.kernels import floats
from celora.kernels.triton import judged, proof
from celora.machine.timing import interleaved
from celora.modeling import varlen
from celora.modeling.attention import attention
from celora.studies.cells import Cell, make_batches
from celora.studies.step import make_step

HERE = Path(__file__).parent
KERNELS, STEPS = HERE / "kernels" / "gpu.jsonl", HERE / "steps" / "gpu.jsonl"
SIZES = (2048, 3072, 4096)  # hidden sizes of Llama 1B, 3B, 8B
CELLS = [Cell(f"h{size}-v128k", data, tokens=2048) for data in ("full", "instruct") for size in SIZES]
ARMS = ("PEFT", "Liger", "Unsloth", "exact", "auto", "fast", "limit")
WATCHED = ("PEFT", "exact", "paper", "auto", "fast")
REPEATS = 20
LENGTHS = (300, 1, 17, 128, 578)  # tokens of packed sequences


def check(device: torch.device) -> None:
    """End with status 1 at the first kernel that is wrong, and 2 where there is no GPU for them."""
    if reason := judged.cannot_run(device):
        print(f"{reason}; run this where there is one.", file=sys.stderr)
        raise SystemExit(2)
    for operation in proof.OPERATIONS:
        if operation == "pack_floats" and not floats.has_floats(device):
            continue
        if reason := proof.wrong_somewhere(operation, device):
            print(f"{operation} {reason}", file=sys.stderr)
            raise SystemExit(1)
        print(f"right: {operation}", flush=True)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        if reason := wrong_attention(device, dtype):
            print(f"attention of packed sequences in {dtype}: {reason}", file=sys.stderr)
            raise SystemExit(1)
        print(f"right: attention of packed sequences in {dtype}", flush=True)


def wrong_attention(device: torch.device, dtype: torch.dtype) -> str:
    """Which result of packed sequences in one call is wrong, or ''. A call each may be half as far from float64."""
    torch.manual_seed(0)
    tokens, module = sum(LENGTHS), nn.Identity().to(device)
    module.num_key_value_groups = 2  # type: ignore[assignment]
    given = [torch.randn(1, heads, tokens, 64).to(device, dtype).requires_grad_() for heads in (8, 4, 4)]
    grad = torch.randn(1, tokens, 8, 64).to(device, dtype)
    begins = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32, device=device)
    mask = varlen.block_mask(begins, tokens, dtype) if varlen.available(device) else None
    together = {"cu_seq_lens_q": begins, "max_length_q": max(LENGTHS)}

    def results(tensors: list[Tensor], grad: Tensor, mask: Any = None, **where: Any) -> list[Tensor]:
        out, _ = attention(module, *tensors, mask, celora_lengths=LENGTHS, **where)
        return [t.detach().double().cpu() for t in (out, *torch.autograd.grad(out, tensors, grad))]

    exact = results([t.detach().double().cpu().requires_grad_() for t in given], grad.double().cpu())
    found = zip(results(given, grad, mask, **together), results(given, grad), exact, strict=True)
    for name, (one, each, true) in zip(("output", "query", "key", "value"), found, strict=True):
        error, allowed = (float((t - true).norm() / true.norm()) for t in (one, each))
        if not error <= 2 * allowed:
            return f"{name} has an error of {error:.2g}, a call each has {allowed:.2g}"
    return ""


def time_kernels(device: torch.device, sizes: tuple[int, ...] = SIZES) -> list[dict[str, Any]]:
    """A row for each operation and size: both backends, and bfloat16's product beside those in 8 bits."""
    found = []
    for operation in proof.OPERATIONS:
        if operation == "pack_floats" and not floats.has_floats(device):
            continue
        for size in sizes:
            calls: dict[str, Callable[[], object]] = proof.contenders(operation, device, size)
            if operation.startswith("pack"):
                x = torch.randn(size, size, device=device).to(torch.bfloat16)
                calls["bfloat16"] = lambda x=x: x @ x
            times = interleaved(calls, repeats=REPEATS, device=device)
            found.append({"operation": operation, "size": size, "times": times} | rows.conditions())
            print(f"{operation} {size}:", *(f"{name} {time['time_ms']} ms" for name, time in times.items()))
    return found


def waits(call: Callable[[], object]) -> int:
    """How often `call` waits for the GPU, as torch notices it."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchroniz" in str(warning.message) for warning in said)


def count_waits(cell: Cell) -> list[dict[str, Any]]:
    """A row for each preset: how often its steady step waits."""
    batches, found = make_batches(cell), []
    for arm in WATCHED:
        with tempfile.TemporaryDirectory() as folder:
            step = make_step(cell, arm, batches, Path(folder) / "plan.json", {})
            for _ in range(12):  # auto looks at every layer in the first ten
                step(batches[0])
            inputs = {name: value.to(step.model.device) for name, value in batches[0].items()}
            found.append(
                {"arm": arm, "waits": waits(lambda step=step, inputs=inputs: step.model(**inputs).loss.backward())}
            )
    return [row | {"cell": cell.model} | rows.conditions() for row in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="begin no cell later, counted from when all is compiled"
    )
    args = parser.parse_args()
    device = torch.device("cuda")
    check(device)
    proof.judge(device)  # as a plan does: from here on, what is right and faster is used
    begun = time.monotonic()  # compiling has no limit
    rows.replace(KERNELS, time_kernels(device), ("operation", "size"))
    for cell in CELLS:
        if time.monotonic() - begun > 60 * args.minutes:
            print(f"left out, for want of time: {cell.model} {cell.data}")
            continue
        run([cell], STEPS, ARMS, REPEATS)
    for row in count_waits(CELLS[0]):
        rows.append(STEPS.with_name("gpu-waits.jsonl"), row)


if __name__ == "__main__":
    main()
