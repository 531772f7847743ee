"""How compiled kernels are called: their arguments, and which tensors they take."""

from __future__ import annotations

import struct

import torch
from torch import Tensor
from torch.nn import Parameter

from celora.errors import CELoraError
from celora.kernels.c.tier import Kernels, load

# A slot for each argument, in the order of the C function's: P a pointer, q a whole number, d a number.
_TYPED = {  # there is one for each dtype, which runs on torch's threads
    "squared_row_norms": "PqqqP",
    "quantise_rows": "PPqqqdPP",
    "scatter_rows": "PPqqPPq",
    "scatter_sums": "PPqqPPPq",
    "softmax_rows": "PqqPddPPPq",
    "column_maxima": "PqqqP",
    "quantise_columns": "PqqqPP",
    "rms_norm": "PqqPddqPP",
    "rms_norm_backward": "PPqqPdPP",
    "gated": "PPqqP",
    "gated_backward": "PPPqqPP",
    "rotate": "PqqqPPqqP",
    # dot.c; only in tiers with 8-bit dot products
    "pack_columns": "PqqqPP",
    "pack_rows": "PqqqPP",
    "gathered_product": "PqqqPPqPPqPqPPPPq",
    "critical_product": "PqqqqdPPqPqPP",
    "quantise_input": "PqqqPPPP",
    "quantised_product": "PPPqqPPPqP",
    # attention.c
    "attention": "PPPPPqqqqqdPqPP",
    "attention_backward": "PPPPPPqqqqqdPqPPPPP",
    # low_rank.c; only for bfloat16, in tiers that multiply it by vectors
    "skinny_product": "PqqqPqqqdqPqP",
    "transposed_product": "PqqqPqqqPP",
}
_NUMBERS = {  # return one
    "choose_rows": "PqqdqPP",
    "panel_columns": "",
    "depth_step": "",
    "together": "",
    "offset": "",
    "paired": "",
    "row_stride": "q",
    "quantised_bytes": "qq",
    "scratch_bytes": "qqqq",
    "attention_work": "qqq",
}
_SLOTS = {name: struct.Struct(slots) for name, slots in (_TYPED | _NUMBERS).items()}
_IN_MEMORY = (Tensor, Parameter)
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def supported(tensor: Tensor) -> bool:
    """Whether the kernels can work on this tensor: on CPU, of a dtype they know, rows contiguous, not being traced.

    They read memory. A tensor of another class may have none, or has it elsewhere.
    """
    if torch.compiler.is_compiling() or type(tensor) not in _IN_MEMORY:
        return False
    if tensor.device.type != "cpu" or tensor.dtype not in _NAMES or tensor.is_neg():
        return False
    return tensor.stride(-1) == 1 and library() is not None


def known(tensor: Tensor) -> Tensor:
    """The tensor as the kernels take it: itself or, in a dtype or layout that they do not know, a float32 copy.

    Raises:
        CELoraError: the tensor's numbers are not in memory, as those of a tool that computes shapes.
    """
    if supported(tensor):
        return tensor
    if type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:
        tensor = tensor.as_subclass(Tensor)  # a class of somebody's around the same memory
    copy = tensor.resolve_neg().float().contiguous()
    if type(copy) not in _IN_MEMORY:
        copy = copy.clone()  # of a tensor that is on its way from other processes
    if type(copy) not in _IN_MEMORY:
        raise CELoraError(f"celora's kernels need numbers in memory, and got a {type(copy).__name__}.")
    return copy


def library() -> Kernels | None:
    """The compiled kernels, or None if they are turned off or cannot be had here: see `tier.why_not`."""
    return load()[0]


def _loaded() -> Kernels:
    loaded = library()
    assert loaded is not None
    return loaded


def call_kernel(name: str, typed: Tensor, *arguments: float) -> None:
    """Run the kernel for the dtype of `typed` on torch's threads."""
    slots = _SLOTS[name].pack(*arguments)
    _loaded().run(f"{name}_{_NAMES[typed.dtype]}", slots, torch.get_num_threads())


def ask_kernel(name: str, *arguments: float) -> int:
    """The number that a kernel returns."""
    return _loaded().run(name, _SLOTS[name].pack(*arguments), 1)


def up_to(number: int, step: int) -> int:
    """The number, rounded up to a multiple of `step`."""
    return -(-number // step) * step


def pointer(tensor: Tensor | None) -> int:
    """Where it lies; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
