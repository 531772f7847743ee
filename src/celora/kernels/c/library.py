"""The compiled kernels as one loaded library: signatures, which tensors they take, how they are called."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from celora.kernels.c.build import build_and_load

_P, _N, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "choose_rows": [_P, _N, _N, ctypes.c_double, _N, _P, _P],
    "squared_row_norms": [_P, _N, _N, _N, _P, _I],
    "quantise_rows": [_P, _P, _N, _N, _N, ctypes.c_float, _P, _P, _I],
    "scatter_rows": [_P, _P, _N, _N, _P, _P, _I, _I],
    "scatter_sums": [_P, _P, _N, _N, _P, _P, _P, _I, _I],
    "softmax_rows": [_P, _N, _N, _P, ctypes.c_float, ctypes.c_float, _P, _P, _P, _I, _I],
    "column_maxima": [_P, _N, _N, _N, _P, _I],
    "quantise_columns": [_P, _N, _N, _N, _P, _P, _I],
    "rms_norm": [_P, _N, _N, _P, ctypes.c_float, ctypes.c_float, _I, _P, _P, _I],
    "rms_norm_backward": [_P, _P, _N, _N, _P, ctypes.c_float, _P, _P, _I],
    "gated": [_P, _P, _N, _N, _P, _I],
    "gated_backward": [_P, _P, _P, _N, _N, _P, _P, _I],
    "rotate": [_P, _N, _N, _N, _P, _P, _N, _I, _P, _I],
}
_DOT_SIGNATURES = {  # dot.c; only where the machine has the instructions
    "pack_columns": [_P, _N, _N, _N, _P, _P, _I],
    "pack_rows": [_P, _N, _N, _N, _P, _P, _I],
    "gathered_product": [_P, _N, _N, _N, _P, _P, _N, _P, _P, _P, _N, _P, _N, _P, _P, _P, _P, _I, _I],
    "critical_product": [_P, _N, _N, _N, _N, ctypes.c_double, _P, _P, _N, _P, _N, _P, _P, _I],
    "quantise_input": [_P, _N, _N, _N, _P, _P, _P, _P, _I],
    "quantised_product": [_P, _P, _P, _N, _N, _P, _P, _P, _N, _P, _I],
}
_ATTENTION_SIGNATURES = {  # attention.c; only where the machine has matrix instructions
    "attention": [_P, _P, _P, _P, _P, _N, _N, _N, _N, _N, ctypes.c_float, _P, _N, _P, _P, _I],
    "attention_backward": [_P, _P, _P, _P, _P, _P, _N, _N, _N, _N, _N, ctypes.c_float, _P, _N, _P, _P, _P, _P, _P, _I],
}
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def supported(tensor: Tensor) -> bool:
    """Whether the kernels can work on this tensor: on CPU, of a dtype they know, rows contiguous, not being traced."""
    if torch.compiler.is_compiling() or tensor.device.type != "cpu" or tensor.dtype not in _NAMES:
        return False
    return tensor.stride(-1) == 1 and library() is not None


def known(tensor: Tensor) -> Tensor:
    """The tensor as the kernels take it: itself or, in a dtype or layout that they do not know, a float32 copy."""
    return tensor if supported(tensor) else tensor.float().contiguous()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None if they are turned off or cannot be built here: see `why_not`."""
    loaded, _ = build_and_load()
    if loaded is None:
        return None
    loaded.choose_rows.restype = _N
    if loaded.panel_columns():
        loaded.row_stride.argtypes, loaded.row_stride.restype = [_N], _N
        loaded.scratch_bytes.argtypes, loaded.scratch_bytes.restype = [_N, _N], _N
        loaded.turned_scratch_bytes.argtypes, loaded.turned_scratch_bytes.restype = [_N, _N, _I], _N
    for name, types in (_SIGNATURES | (_DOT_SIGNATURES if loaded.panel_columns() else {})).items():
        for function in [name] if name == "choose_rows" else [f"{name}_{dtype}" for dtype in _NAMES.values()]:
            getattr(loaded, function).argtypes = types
    if hasattr(loaded, "attention_work"):
        loaded.attention_work.argtypes, loaded.attention_work.restype = [_N, _N, _I], _N
        for name, types in _ATTENTION_SIGNATURES.items():
            getattr(loaded, f"{name}_bf16").argtypes = types
    return loaded


def loaded_library() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None
    return loaded


def call_kernel(name: str, typed: Tensor, *arguments: float | None) -> None:
    getattr(loaded_library(), f"{name}_{_NAMES[typed.dtype]}")(*arguments, torch.get_num_threads())


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
