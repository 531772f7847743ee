"""Every Triton kernel against torch, in the interpreter or on a GPU: odd sizes, rows apart, NaN, infinity."""

from __future__ import annotations

import itertools

import pytest
import torch

from celora.kernels import plain
from celora.kernels.plain import wrong_integers
from celora.kernels.triton import launches, product, proof
from triton_here import DEVICE, DTYPES, needs_triton, quiet

__all__ = ["quiet"]
pytestmark = needs_triton
PASSES = [name for name in proof.OPERATIONS if not name.startswith("pack")]
WEIGHTS = [name for name in proof.OPERATIONS if name.startswith("pack")]


@pytest.mark.parametrize("finite", [True, False], ids=["finite", "not finite"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 129), (7, 33), (37, 100)], ids=str)
@pytest.mark.parametrize("operation", PASSES)
def test_a_pass(operation: str, shape: tuple[int, int], dtype: torch.dtype, finite: bool) -> None:
    assert proof.wrong(operation, *shape, dtype, DEVICE, finite=finite) == ""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "finite"),
    [*itertools.product([(1, 1), (37, 80)], [True, False]), *((odd, True) for odd in [(5, 17), (7, 33), (33, 129)])],
    ids=lambda value: {True: "finite", False: "not finite"}.get(value, str(value)),
)
@pytest.mark.parametrize("operation", WEIGHTS)
def test_a_product(operation: str, shape: tuple[int, int], dtype: torch.dtype, finite: bool) -> None:
    if operation == "pack_both_ways" and shape[1] % 16 and wrong_integers(DEVICE):
        return  # torch's product computes such a depth, and is wrong here
    assert proof.wrong(operation, *shape, dtype, DEVICE, finite=finite) == ""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", [name for name in proof.OPERATIONS if name != "column_maxima"])
def test_no_rows(operation: str, dtype: torch.dtype) -> None:
    assert proof.wrong(operation, 0, 16, dtype, DEVICE, finite=True) == ""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows_have_no_maxima(dtype: torch.dtype) -> None:
    assert launches.column_maxima(torch.empty(0, 3, dtype=dtype, device=DEVICE)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", [name for name in PASSES if name != "softmax_rows"])
def test_columns_that_lie_apart(operation: str, dtype: torch.dtype) -> None:
    x = torch.randn(9, 20, device=DEVICE).to(dtype).t()
    assert proof._CHECKS[operation](x, torch.Generator(DEVICE).manual_seed(0)) == ""


def test_a_row_longer_than_a_block_and_more_rows_than_a_part() -> None:
    """Several blocks of a row add up, and so do several parts of the rows."""
    assert proof.wrong("softmax_rows", 3, 4500, torch.float32, DEVICE, finite=True) == ""
    assert proof.wrong("quantise_rows", 3, 5000, torch.float32, DEVICE, finite=True) == ""
    x = torch.randn(600, 5, device=DEVICE)
    torch.testing.assert_close(launches.squared_column_norms(x), plain.squared_column_norms(x))
    assert launches.column_maxima(x).equal(plain.column_maxima(x))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("cap", [None, 30.0])
def test_a_target_that_is_no_word_is_no_number(cap: float | None, smoothing: float) -> None:
    z = torch.randn(4, 50, device=DEVICE)
    targets, found = torch.tensor([3, -1, 50, 49], device=DEVICE), torch.empty(4, device=DEVICE)
    launches.softmax_rows(
        z, targets, scale=1.0, cap=cap, smoothing=smoothing, log_probs=found, entropy=None, top1=None, write=True
    )
    assert found.isfinite().tolist() == z.isfinite().all(1).tolist() == [True, False, False, True]
    assert z[1:3].isnan().all()


def test_kernels_start_where_their_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton itself would start them on the current device."""
    asked, device_of = [], torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: asked.append(x) or device_of(x))
    x = torch.randn(3, 40, device=DEVICE)
    q, scale = launches.quantise_rows(x, None)
    launches.squared_row_norms(x)
    launches.column_maxima(x)
    assert [each is x for each in asked] == [True] * 3
    product.scaled_product(q, q.t(), scale, scale, torch.empty(3, 3, device=DEVICE))
    assert asked[3] is q


def test_8_bit_floats_round_to_even_as_torch_does() -> None:
    """The values are half-way between two steps, and below the smallest normal number."""
    x = torch.tensor(
        [[448.0, 17.0, 19.0, -18.0, 2**-7, 3 * 2**-10, 2**-9, 2**-10, 1.5 * 2**-9, 0.0, -0.3]], device=DEVICE
    )
    q, scale = launches.quantise_rows(x, None, dtype=torch.float8_e4m3fn)
    assert scale.tolist() == [1.0]
    assert q.float().equal(x.to(torch.float8_e4m3fn).float())


def test_int8_sums_are_exact_however_long() -> None:
    """The largest sums of this depth that 32 bits can hold. float32 would round them."""
    depth = 2000
    a = torch.full((3, depth), 127, dtype=torch.int8, device=DEVICE)
    a[1, ::2] = -127
    b = torch.full((depth, 5), 127, dtype=torch.int8, device=DEVICE)
    b[0, 1] = 126
    ones = torch.ones(5, device=DEVICE)
    out = torch.empty(3, 5, device=DEVICE)
    product.scaled_product(a, b, ones[:3], ones, out)
    assert out.double().equal((a.double() @ b.double()).float().double())
