"""Makes a model compute in float32 for a while, to get its gradient without the rounding of a shorter dtype.

Each bfloat16 or float16 parameter and buffer gets a float32 copy of its data, and its own data back afterwards. The
parameters stay the same objects with the same memory. So optimizers, tied weights and hooks notice nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from celora.errors import CELoraError
from celora.machine.memory import available_memory
from celora.machine.precision import whole_float32
from celora.machine.processes import in_company

_HALF = (torch.bfloat16, torch.float16)
_SUFFICIENT = (torch.float32, torch.float64)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Compute in float32: weights in float32, no autocast, no shortened float32 products.

    It takes 4 more bytes for each number in bfloat16 or float16.

    Raises:
        CELoraError: the weights are quantised, sharded or offloaded, the copies do not fit into memory, or a forward
            inside still computes in a shorter dtype.
    """
    short = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in _HALF]
    _refuse(model)
    _check_memory(short)
    kept = [(t, t.data, t.grad) for t in short]
    with whole_float32(), ExitStack() as stack:
        for device in {t.device.type for t in model.parameters()}:
            stack.enter_context(torch.autocast(device, enabled=False))
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                stack.callback(module.register_forward_hook(_check_output).remove)
        try:
            for tensor, data, _ in kept:
                tensor.grad = None  # a gradient must have its parameter's dtype
                tensor.data = data.float()
            yield
        finally:
            for tensor, data, grad in kept:
                tensor.grad = None
                tensor.data = data
                tensor.grad = grad


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Set every dropout rate to 0 for a while, because masks differ between dtypes."""
    rates = [(module, name, rate) for module in model.modules() for name, rate in _rates(module).items()]
    try:
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)


def _rates(module: nn.Module) -> dict[str, float]:
    """The dropout rates among the attributes of this module."""
    own = ("p",) if isinstance(module, _DROPOUTS) else ()
    named = {name: value for name, value in vars(module).items() if name in own or name.endswith("dropout")}
    return {name: value for name, value in named.items() if isinstance(value, float)}


def _refuse(model: nn.Module) -> None:
    """Raise CELoraError if the model would not compute with float32 copies of its weights."""
    advice = "audit without reference, or a model"
    if in_company():
        raise CELoraError(f"reference='float32' works in one process; {advice} that is whole in one.")
    for module in model.modules():
        if getattr(module, "is_quantized", False):
            raise CELoraError(
                f"reference='float32', but the weights of {type(module).__name__} are quantised; {advice} that is not."
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta or hasattr(tensor, "ds_id"):
            raise CELoraError(f"reference='float32', but {name!r} is offloaded or sharded; {advice} that is in memory.")
        plain = type(tensor.data) is Tensor and (tensor.dtype in (*_HALF, *_SUFFICIENT))
        if not plain and isinstance(tensor, nn.Parameter):
            raise CELoraError(
                f"reference='float32', but {name!r} is a {type(tensor).__name__} of {tensor.dtype}, quantised or "
                f"sharded; {advice} with ordinary weights in bfloat16, float16 or float32."
            )


def _check_memory(short: list[Tensor]) -> None:
    needed: Counter[torch.device] = Counter()
    for tensor in short:
        needed[tensor.device] += 4 * tensor.numel()
    for device, size in needed.items():
        free = available_memory(device)
        if free is not None and size > free:
            raise CELoraError(
                f"reference='float32' needs {size / 1e9:.1f} GB on {device} for float32 copies of the weights, and "
                f"{free / 1e9:.1f} GB are free; audit without reference, or a smaller model of the same kind."
            )


def _check_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A forward hook. Accelerate puts autocast inside the model's own forward, where it cannot be switched off."""
    if isinstance(output, Tensor) and output.dtype in _HALF:
        raise CELoraError(
            f"reference='float32', but the model's own forward computes in {output.dtype}; audit the model before "
            "it is given to accelerator.prepare or wrapped in autocast."
        )
