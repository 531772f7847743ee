"""The proof finds what is wrong, and both contenders of an operation run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from celora.kernels import floats, plain
from celora.kernels.triton import judged, launches, product, proof
from triton_here import DEVICE, needs_triton, quiet

__all__ = ["quiet"]
CPU = torch.device("cpu")
PLAIN = {name: getattr(plain, name) for name in ("squared_row_norms", "squared_column_norms", "column_maxima")}


@pytest.fixture
def as_torch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Kernels that compute with torch, so Triton is not needed."""
    for name, run in (*PLAIN.items(), ("softmax_rows", plain.softmax_rows)):
        monkeypatch.setattr(launches, name, run)
    return monkeypatch


def wrong(operation: str, *, finite: bool = True) -> str:
    return proof.wrong(operation, 9, 20, torch.float32, torch.device("cpu"), finite=finite)


@pytest.mark.usefixtures("as_torch")
@pytest.mark.parametrize("operation", [*PLAIN, "softmax_rows"])
@pytest.mark.parametrize("finite", [True, False])
def test_what_is_right_is_found_right(operation: str, finite: bool) -> None:
    assert wrong(operation, finite=finite) == ""


@pytest.mark.parametrize("operation", PLAIN)
def test_what_is_off_is_found(operation: str, as_torch: pytest.MonkeyPatch) -> None:
    as_torch.setattr(launches, operation, lambda x: PLAIN[operation](x) * 1.0001)
    assert wrong(operation)
    as_torch.setattr(launches, operation, lambda x: PLAIN[operation](x.nan_to_num(0, 0, 0)))
    assert not wrong(operation)
    assert wrong(operation, finite=False)


def test_a_softmax_that_is_off_is_found(as_torch: pytest.MonkeyPatch) -> None:
    def off(z: Tensor, targets: Tensor, **asked: object) -> None:
        plain.softmax_rows(z, targets, **asked)  # type: ignore[arg-type]
        z[3, 2] += 0.01

    as_torch.setattr(launches, "softmax_rows", off)
    assert "gradient" in wrong("softmax_rows")


@needs_triton
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda out, index: out[1].fill_(0), "not asked for"),
        (lambda out, index: out[0].mul_(1.001), "was off by"),
    ],
)
def test_a_product_that_is_off_is_found(
    change: Callable[[Tensor, Tensor], object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = product.scaled_product

    def off(*operands: Tensor, index: Tensor, **others: object) -> Tensor:
        out = right(*operands, index=index, **others)  # type: ignore[arg-type]
        change(out, index)
        return out

    monkeypatch.setattr(product, "scaled_product", off)
    assert said in proof.wrong("pack_weight", 9, 32, torch.float32, DEVICE, finite=True)


@needs_triton
@pytest.mark.parametrize("operation", ["quantise_rows", "pack_weight", "pack_both_ways", "pack_floats"])
def test_where_rows_are_rounded_wrongly_no_product_is_used(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = launches.quantise_rows

    def lower(x: Tensor, index: Tensor | None, **others: Any) -> tuple[Tensor, Tensor]:
        q, scale = right(x, index, **others)
        return (q.float() - 1).clamp(-127, 127).to(q.dtype), scale

    monkeypatch.setattr(launches, "quantise_rows", lower)
    assert proof.wrong(operation, 9, 32, torch.float32, DEVICE, finite=True) == "rounded to other numbers than torch"


@needs_triton
@pytest.mark.parametrize("dtype", judged.DTYPES, ids=str)
@pytest.mark.parametrize("operation", proof.OPERATIONS)
def test_both_contenders_of_an_operation_run(
    operation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "why_no_integers", lambda device: "")
    monkeypatch.setattr(floats, "why_not", lambda device: "")
    calls = proof.contenders(operation, DEVICE, 32, (32, 48), dtype)
    assert list(calls) == ["triton", "torch"]
    for call in calls.values():
        call()


@pytest.fixture
def no_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's own products in 8 bits fail, as on some GPUs."""

    def fails(*_: object, **__: object) -> Tensor:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(plain, "integer_product", fails)
    monkeypatch.setattr(floats, "borrow", lambda name: fails)
    plain.wrong_integers.cache_clear()
    floats._takes_scales.cache_clear()
    yield
    plain.wrong_integers.cache_clear()
    floats._takes_scales.cache_clear()


WEIGHTS = [name for name in proof.OPERATIONS if name.startswith("pack")]


@needs_triton
@pytest.mark.usefixtures("no_products")
@pytest.mark.parametrize("operation", WEIGHTS)
def test_a_right_kernel_is_right_where_torch_has_no_product(operation: str) -> None:
    assert proof.wrong(operation, 9, 32, torch.float32, DEVICE, finite=True) == ""
    calls = proof.contenders(operation, DEVICE, 32, (32, 48))
    assert list(calls) == ["triton"]
    calls["triton"]()


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", WEIGHTS)
def test_torchs_product_has_the_closed_form_that_kernels_are_compared_with(
    operation: str, dtype: torch.dtype, finite: bool
) -> None:
    _, pack, takes = proof._PACKED[operation]
    if not takes(CPU):
        return
    x, generator = torch.randn(9, 32).to(dtype), torch.Generator().manual_seed(0)
    if not finite:
        x[2, 0], x[3, 1] = float("nan"), float("inf")
    in_8_bits = torch.float8_e4m3fn if operation == "pack_floats" else torch.int8
    assert proof._weight(x, generator, pack, in_8_bits, int(operation == "pack_both_ways")) == ""
    if operation == "pack_both_ways":
        assert proof._forward(x, generator, pack) == ""
