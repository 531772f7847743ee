"""Triton kernels and attention in one call on an NVIDIA GPU, compared with torch, then timed: for `benchmarks.gpu`."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import rows
from celora.errors import first_line, out_of_memory
from celora.kernels import floats
from celora.kernels.backends import torch_alone
from celora.kernels.triton import judged, proof
from celora.machine.memory import available_memory
from celora.machine.timing import interleaved
from celora.modeling import varlen
from celora.modeling.attention import attention
from celora.studies.cells import LLAMAS, Llama

MODELS = {name.removeprefix("llama-").upper(): shape for name, shape in LLAMAS.items()}
ROWS = Path(__file__).with_name("gpu.jsonl")
TOKENS, REPEATS = 4096, 20
ATTENTION = "attention of packed sequences"
LENGTHS = (300, 1, 17, 128, 578)  # tokens of packed sequences
NO_MEMORY = "it could not be compared"
_NOISE = 1e-5  # of float32: an error below is none
_PROCESS_BYTES = 2 << 30  # of the GPU, for a process that compares: most of it is CUDA's own

Task = tuple[str, torch.dtype, torch.device]


def operations(device: torch.device) -> list[str]:
    """The operations that have a kernel for this device."""
    return [name for name in proof.OPERATIONS if name != "pack_floats" or floats.has_floats(device)]


def check(device: torch.device) -> bool:
    """Whether every kernel is right in every dtype; ends with status 2 where there is no GPU for them.

    A task that runs out of memory beside others is tried again alone.
    """
    if reason := judged.cannot_run(device):
        print(f"{reason}; run this where there is one.", file=sys.stderr)
        raise SystemExit(2)
    tasks = [(name, dtype, device) for name in (ATTENTION, *operations(device)) for dtype in judged.DTYPES]
    right, again = True, []
    with processes(at_once(device)) as map_:
        for task, reason in zip(tasks, map_(_wrong, tasks), strict=True):
            if reason == NO_MEMORY:
                again.append(task)
            else:
                right = _say(task, reason) and right
    for task in again:
        with processes(1) as map_:  # new, as one that has run keeps memory
            right = _say(task, *map_(_wrong, [task])) and right
    return right


def at_once(device: torch.device) -> int:
    """How many processes check kernels: as many as processors, at most 16, and as the GPU has free memory for."""
    free = available_memory(device)
    room = 16 if free is None else free // _PROCESS_BYTES
    return max(1, min(16, os.cpu_count() or 1, room))


@contextmanager
def processes(number: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """`map` in so many new processes: each kernel takes a second to compile."""
    with ProcessPoolExecutor(number, get_context("spawn")) as pool:
        yield pool.map


def _say(task: Task, reason: str) -> bool:
    name, dtype, _ = task
    how = "out of memory" if reason == NO_MEMORY else "WRONG" if reason else "right"
    print(f"{how}: {name} {dtype} {reason}".strip(), flush=True)
    return not reason


def _wrong(task: Task) -> str:
    name, dtype, device = task
    try:
        if name == ATTENTION:
            return wrong_attention(device, dtype)
        with torch_alone():  # an earlier verdict must not make Triton its own reference
            return proof.wrong_somewhere(name, device, (dtype,))
    except Exception as error:  # as `wrong_somewhere` tells it: the other tasks go on
        return NO_MEMORY if out_of_memory(error) else f"failed: {type(error).__name__}: {first_line(error)}"


def wrong_attention(device: torch.device, dtype: torch.dtype) -> str:
    """Which result of packed sequences in one call is wrong, or ''. A call each may be half as far from float64."""
    torch.manual_seed(0)
    tokens, module = sum(LENGTHS), nn.Identity().to(device)
    module.num_key_value_groups = 2  # type: ignore[assignment]
    given = [torch.randn(1, heads, tokens, 64).to(device, dtype).requires_grad_() for heads in (8, 4, 4)]
    grad = torch.randn(1, tokens, 8, 64).to(device, dtype)
    begins = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32, device=device)
    mask = varlen.block_mask(begins, tokens, dtype, 64) if varlen.available(device) else None
    together = {"celora_lengths": LENGTHS, "cu_seq_lens_q": begins, "max_length_q": max(LENGTHS)}

    def results(out: Tensor, tensors: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
        return [t.detach().double().cpu() for t in (out, *torch.autograd.grad(out, tensors, grad))]

    true = [t.detach().double().cpu().requires_grad_() for t in given]
    found = zip(
        results(attention(module, *given, mask, **together)[0], given, grad),  # type: ignore[arg-type]
        results(_each(given), given, grad),
        results(_each(true), true, grad.double().cpu()),
        strict=True,
    )
    for name, (one, each, exact) in zip(("output", "query", "key", "value"), found, strict=True):
        error, allowed = (float((t - exact).norm() / exact.norm()) for t in (one, each))
        if not error <= max(2 * allowed, _NOISE):
            return f"{name} has an error of {error:.2g}, a call each has {allowed:.2g}"
    return ""


def _each(tensors: Sequence[Tensor]) -> Tensor:
    """torch's attention of each sequence: (1, tokens, heads, d)."""
    pieces = zip(*(t.split(LENGTHS, dim=2) for t in tensors), strict=True)
    found = [scaled_dot_product_attention(*piece, is_causal=True, enable_gqa=True) for piece in pieces]
    return torch.cat(found, dim=2).transpose(1, 2)


def time_kernels(
    device: torch.device,
    models: Mapping[str, Llama] = MODELS,
    tokens: int = TOKENS,
    *,
    deadline: float = math.inf,
) -> Iterator[dict[str, Any]]:
    """A row for each operation and model, for `up_proj` or the head: Triton, torch and, of products, bfloat16.

    Torch's products are left out where they cannot run. What fails costs no other row: its own says why. None begins
    after `deadline` (of `time.monotonic`); those left out are named.
    """
    known, left = judged.verdict(device), []
    for model, shape in models.items():
        for operation in operations(device):
            if time.monotonic() > deadline:
                left.append(f"{operation} of {model}")
                continue
            weight = shape.words if operation == "softmax_rows" else shape.intermediate, shape.hidden
            row = {"operation": operation, "model": model, "tokens": tokens, "out": weight[0], "in": weight[1]}
            row["used"] = known is not None and operation in known.operations
            try:
                row["times"] = _times(operation, device, tokens, weight)
            except Exception as error:  # this GPU or this version of Triton refuses it, or memory is short
                row["not_run"] = f"{type(error).__name__}: {first_line(error)}"[:200]
            yield row | rows.conditions()
    if left:
        print(f"left out, for want of time: {', '.join(left)}; `--minutes 60` measures these kernels", flush=True)


def _times(operation: str, device: torch.device, tokens: int, weight: tuple[int, int]) -> dict[str, dict[str, float]]:
    with torch_alone():  # contender `torch` asks the table for the passes around its product
        calls = proof.contenders(operation, device, tokens, weight)
        if operation.startswith("pack"):
            calls["bfloat16"] = _in_bfloat16(operation, device, tokens, weight)
        return interleaved(calls, repeats=REPEATS, device=device)


def _in_bfloat16(operation: str, device: torch.device, tokens: int, weight: tuple[int, int]) -> Callable[[], object]:
    """torch's products of as many rows as the contenders of this operation multiply."""
    g, x = (torch.randn(tokens, size, device=device, dtype=torch.bfloat16) for size in weight)
    w = torch.randn(weight, device=device, dtype=torch.bfloat16)
    if operation == "pack_both_ways":
        return lambda: (x @ w.t(), g[::2] @ w)
    return lambda: g[::2] @ w
