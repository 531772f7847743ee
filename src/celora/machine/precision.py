"""The precision of float32 products, which a user may shorten.

torch 2.9 and later have a setting for each backend, `fp32_precision`. Once it is used, torch refuses the older setting
for all of them (`torch.get_float32_matmul_precision`). Transformers uses the newer one for `tf32=True`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_UNIT = 2.0**-24
_SHORT = {"tf32": 2.0**-11, "high": 2.0**-11, "bf16": 2.0**-8, "medium": 2.0**-8}


def float32_roundoff(device: torch.device) -> float:
    """The unit roundoff of a number in a float32 product on `device`: 2^-24, or what the user allows."""
    matmuls = _matmuls()
    if not matmuls:
        return _SHORT.get(torch.get_float32_matmul_precision(), _UNIT)
    return _SHORT.get(matmuls["cpu" if device.type == "cpu" else "cuda"].fp32_precision, _UNIT)


@contextmanager
def whole_float32() -> Iterator[None]:
    """Multiply float32 in float32 for a while, whatever the user allows."""
    matmuls = _matmuls()
    if not matmuls:
        before: Any = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    kept = {name: matmul.fp32_precision for name, matmul in matmuls.items()}
    try:
        for matmul in matmuls.values():
            matmul.fp32_precision = "ieee"
        yield
    finally:
        for name, matmul in matmuls.items():
            matmul.fp32_precision = "none"  # what holds for all backends
            if matmul.fp32_precision != kept[name]:
                matmul.fp32_precision = kept[name]


def _matmuls() -> dict[str, Any]:
    """The settings of the backends; none before torch 2.9."""
    found = {"cpu": getattr(torch.backends.mkldnn, "matmul", None), "cuda": torch.backends.cuda.matmul}
    return found if all(hasattr(matmul, "fp32_precision") for matmul in found.values()) else {}
