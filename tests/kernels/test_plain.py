"""torch's operators: which of its products can be used on a device, and what they need for a moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from celora.kernels import plain
from celora.kernels.backends import explain
from celora.kernels.floats import ScaledFloats
from celora.kernels.triton.product import TiledFloats, TiledWeight
from orders import Orders
from patching import patch_all
from without import without

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def in_whole_numbers(a: Tensor, b: Tensor) -> Tensor:
    """What `torch._int_mm` gives where it is right."""
    assert b.stride() == (1, 64)  # as GPUs want their second operand
    return (a.long() @ b.long()).int()


def fails(a: Tensor, b: Tensor) -> Tensor:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED\nCUDA kernel errors might be reported later")


@pytest.mark.parametrize(
    ("multiply", "said"),
    [
        (in_whole_numbers, ""),
        (lambda a, b: in_whole_numbers(a, b).clamp(max=2**15 - 1), "is wrong on this device"),
        (fails, "fails on this device: CUDA error: CUBLAS_STATUS_NOT_SUPPORTED"),
    ],
)
def test_a_product_is_tried_before_it_is_used(multiply: Callable[[Tensor, Tensor], Tensor], said: str) -> None:
    assert plain.wrong_product(multiply, torch.int8, CPU, 127) == said


def test_no_memory_for_a_trial_says_nothing_about_a_product() -> None:
    def full(a: Tensor, b: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        plain.wrong_product(full, torch.int8, CPU, 127)


def test_a_gpu_that_fails_the_trial_has_no_products_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_all(monkeypatch, "celora.kernels.plain:wrong_integers", lambda device: "is wrong on this device")
    assert not plain.takes_integers(GPU)
    assert explain("pack_weight", GPU) == "none: torch's int8 product is wrong on this device"


class Floats(TorchDispatchMode):
    """Keeps every float32 result of an operator, so that no two have the same address."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.kept += [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.dtype == torch.float32]
        return result

    @property
    def sizes(self) -> list[int]:
        """How many numbers each piece of memory has."""
        pieces = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4 for t in self.kept}
        return list(pieces.values())


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_BLOCK_NUMBERS_ELSEWHERE", 100)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("biased", [True, False])
def test_a_products_sums_are_scaled_block_by_block(biased: bool) -> None:
    if plain.why_no_integers(CPU):
        return
    w, bias = torch.randn(40, 32), torch.randn(40) if biased else None
    packed = plain.IntegersBothWays.pack(w, plain.row_scales(w))
    rows = packed.quantise(torch.randn(7, 32))
    expected = plain.integer_product(rows.q, packed.q.t()) * (rows.scale[:, None] * packed.scale)
    expected = expected if bias is None else expected + bias
    with Floats() as floats:
        found = packed.multiply(rows, bias, torch.empty(7, 40, dtype=torch.bfloat16))
    assert found.equal(expected.bfloat16())
    assert max(floats.sizes) <= 100


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("index", [None, torch.tensor([0, 2, 3, 5, 6, 7, 8])])
@pytest.mark.parametrize("column_scale", [None, torch.linspace(0.5, 2, 40)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16])
def test_rows_are_scaled_block_by_block(index: Tensor | None, column_scale: Tensor | None, dtype: torch.dtype) -> None:
    y, row_scale = (100 * torch.randn(7, 40)).to(dtype), torch.rand(7)
    like = torch.ones(7 if index is None else 9, 3, dtype=torch.bfloat16)
    scaled = y.float() * row_scale[:, None]
    expected = (scaled if column_scale is None else scaled * column_scale).bfloat16()
    if index is not None:
        expected = like.new_zeros(9, 40).index_copy_(0, index, expected)
    with Floats() as floats:
        found = plain.scatter_rows(
            y, like, index, position=None, row_scale=row_scale, column_scale=column_scale, onto=None
        )
    assert found.equal(expected)
    assert max(floats.sizes) <= 100


@pytest.mark.parametrize("offset", [0, 128])
def test_rows_are_quantised_with_one_copy_in_float32(offset: int) -> None:
    x = torch.randn(7, 40).bfloat16()
    with Floats() as floats:
        q, scale = plain.quantise_rows(x, None, offset=offset)
    assert floats.sizes.count(x.numel()) == 1
    assert q.int().equal((x.float() / scale[:, None]).round().int() + offset)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pack", [TiledWeight.pack, TiledFloats.pack, plain.Integers.pack, ScaledFloats.pack])
def test_a_weight_is_packed_without_a_copy_in_float32(
    pack: Callable[[Tensor, Tensor], Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "c")
    weight, scale = torch.randn(24, 40).to(dtype), torch.rand(40) / 50 + 0.01
    with Floats() as floats:
        q = pack(weight, scale).q
    if q.dtype == torch.int8:
        expected = (weight.float() * (1 / scale)).round().to(torch.int8)
    else:
        expected = (weight.float() / scale).to(q.dtype)
    assert q.stride(0) == 1
    assert len(q) == 32  # a multiple of 16
    assert q[:24].view(torch.int8).equal(expected.view(torch.int8))
    assert not q[24:].view(torch.int8).any()
    assert max(size for size in floats.sizes if size != weight.numel() or dtype == torch.bfloat16) <= 100


def backward(weight: Any, x: Tensor) -> Tensor:
    return weight.rows(x, None, position=None, onto=None)  # type: ignore[no-any-return]


def forward(weight: Any, x: Tensor) -> Tensor:
    return weight.multiply(weight.quantise(x), None, torch.empty(len(x), 32, device=x.device))  # type: ignore[no-any-return]


PRODUCTS = [
    (plain.Integers.pack, backward),
    (plain.IntegersBothWays.pack, backward),
    (plain.IntegersBothWays.pack, forward),
    (ScaledFloats.pack, backward),
]


@pytest.mark.parametrize("by_columns", [True, False])
@pytest.mark.parametrize(("pack", "multiply"), PRODUCTS)
def test_products_get_operands_that_lie_as_gpus_want_them(pack: Any, multiply: Any, by_columns: bool) -> None:
    """For a gradient or an input that lies column by column, too. Tensors without numbers stand for those of a GPU."""
    x = torch.empty(32, 40, device="meta").t() if by_columns else torch.empty(40, 32, device="meta")
    with Orders() as orders:
        multiply(pack(torch.empty(32, 32, device="meta"), torch.empty(32, device="meta")), x)
    assert len(orders.shapes) == 1


class OnCuda(Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    device = GPU


def test_integer_products_of_few_rows_get_more_on_cuda() -> None:
    """Its kernels refuse 16 rows and fewer."""
    weight = plain.column_major(torch.ones(32, 48, dtype=torch.int8))
    with Orders() as orders:
        for rows in (1, 16, 17):
            y = plain.integer_product(torch.ones(rows, 32, dtype=torch.int8).as_subclass(OnCuda), weight)
            assert y.shape == (rows, 48)
            assert (y == 32).all()
    assert [shape[0] for shape, _ in orders.shapes] == [32, 32, 17]


@pytest.mark.parametrize("offset", [0, 128])
def test_rows_that_lie_apart_are_quantised_alike(offset: int) -> None:
    x = torch.randn(40, 7).t()
    q, scale = plain.quantise_rows(x, None, offset=offset)
    expected, same = plain.quantise_rows(x.contiguous(), None, offset=offset)
    assert q.is_contiguous()
    assert q.equal(expected)
    assert scale.equal(same)
