"""8-bit products, compared with their reference, in every dtype and on every path of a CPU."""

from __future__ import annotations

import copy
import os
import pickle
from typing import Any

import pytest
import torch

from celora.errors import CELoraError
from celora.kernels import plain as plain_module
from celora.kernels.backends import available, choose
from celora.kernels.plain import Integers, column_major, integer_product, padded
from celora.numerics import reference, select
from celora.numerics.products.base import Native
from celora.numerics.products.both_ways import Int8BothWays, levels_together
from celora.numerics.products.fp8 import Fp8Product
from celora.numerics.products.int8 import Int8Product
from celora.numerics.products.registry import make_product
from forked import code, run
from machine import refuses
from patching import patch_all
from tiers import paired
from without import pretend, take_path, without

SHAPES = [(16, 16), (48, 64), (33, 20), (64, 7)]


@pytest.fixture(params=["compiled", "library", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return take_path(monkeypatch, request.param)


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_int8_equals_its_reference(path: str, shape: tuple[int, int], dtype: torch.dtype, copies: bool) -> None:
    if refuses(copy=copies):
        return
    W, G = (torch.randn(shape) / 8).to(dtype), torch.randn(25, shape[0]).to(dtype)
    product = Int8Product(copy=copies)
    estimate = product(G, W)
    closed = reference.int8(G.double(), W.double(), paired=copies and paired())
    assert estimate.dtype == dtype
    # A value half-way between two steps may round either way. In half precision the result is rounded twice.
    assert (estimate.double() - closed).norm() / closed.norm() < (
        3e-3 if dtype in (torch.float32, torch.float64) else 6e-3
    )
    exact = G.double() @ W.double()
    assert (estimate.double() - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("onto", [True, False])
@pytest.mark.parametrize("kind", [Native, Int8Product, Fp8Product])
def test_rows_go_to_their_places(path: str, kind: type, copies: bool, onto: bool) -> None:
    if kind is not Native and refuses(kind.name, copy=copies):
        return
    W, G = torch.randn(32, 48), torch.randn(20, 32)
    index = torch.tensor([0, 3, 4, 11, 19])
    there = torch.randn(20, 48) if onto else None
    expected = torch.zeros(20, 48) if there is None else there.clone()
    expected[index] = G[index] @ W
    product = kind() if kind is Native else kind(copy=copies)
    found = product.rows(G, W, index, onto=there)
    others = torch.ones(20, dtype=torch.bool)
    others[index] = False
    assert found[others].equal(expected[others])
    assert (found - expected).norm() / expected.norm() < {Native: 1e-6, Int8Product: 0.03, Fp8Product: 0.08}[kind]


@pytest.mark.parametrize("kind", [Int8Product, Fp8Product])
def test_a_changed_weight_is_quantised_anew(kind: type) -> None:
    if refuses(kind.name):
        return
    W, G = torch.randn(32, 16), torch.randn(8, 32)
    product = kind()
    product(G, W)
    W *= -3  # this counts up the weight's version
    assert (product(G, W) - G @ W).norm() / (G @ W).norm() < 0.1
    packed = product._packed
    product.recheck(W)
    assert product._packed is packed
    W.data.mul_(-2)  # this does not; PEFT merges like this, so estimators look again at each refresh
    product.recheck(W)
    assert (product(G, W) - G @ W).norm() / (G @ W).norm() < 0.1


@pytest.mark.parametrize("kind", [Int8Product, Fp8Product, Int8BothWays])
def test_another_weight_in_the_same_place_is_quantised_anew(kind: type) -> None:
    """The next tensor may get the same address, and its version starts at the same number."""
    if refuses(kind.name):
        return
    G, product, memory = torch.randn(8, 32), kind(), torch.randn(32, 16).numpy()
    W = torch.from_numpy(memory)
    product(G, W)
    del W
    memory *= -3
    W = torch.from_numpy(memory)
    assert (product(G, W) - G @ W).norm() / (G @ W).norm() < 0.1


@pytest.mark.parametrize("kind", [Int8Product, Fp8Product])
def test_copies_and_pickles_make_their_own_copy_of_the_weight(kind: type) -> None:
    if refuses(kind.name):
        return
    W, G = torch.randn(32, 16), torch.randn(8, 32)
    product = kind()
    expected = product(G, W)
    for other in (copy.deepcopy(product), pickle.loads(pickle.dumps(product))):
        assert other._packed is None
        assert other(G, W).equal(expected)


@pytest.mark.parametrize("kind", [Int8Product, Fp8Product])
def test_zeros_and_what_is_not_finite(path: str, kind: type) -> None:
    if refuses(kind.name):
        return
    W, G = torch.randn(32, 16), torch.randn(6, 32)
    W[:, 3], G[2] = 0, 0
    G[4, 7] = float("inf")
    G[5, 1] = float("nan")
    result = kind()(G, W)
    assert (result[2] == 0).all()
    assert torch.isfinite(result[:4]).all()
    assert (result[:4, 3] == 0).all()
    assert not torch.isfinite(result[4:]).all(1).any()


def test_fp8_is_near_the_exact_product() -> None:
    if refuses("fp8"):
        return
    W, G = torch.randn(64, 32) / 8, torch.randn(40, 64)
    assert (Fp8Product()(G, W) - G @ W).norm() / (G @ W).norm() < 0.06


@pytest.mark.parametrize("kept", [1, 24, 317])
def test_any_number_of_rows_can_be_summed_over(kept: int) -> None:
    """`columns` may keep any number of rows. Kernels of GPUs need multiples of 16, so zeros are added."""
    W, G = torch.randn(kept, 32) / 8, torch.randn(40, kept)
    assert refuses("fp8") or (Fp8Product()(G, W) - G @ W).norm() / (G @ W).norm() < 0.06
    q, w = torch.randint(-127, 128, (40, kept)).to(torch.int8), torch.randint(-127, 128, (kept, 32)).to(torch.int8)
    packed = column_major(padded(w, 0))
    assert len(packed) % 16 == 0
    assert refuses(copy=False) or torch.equal(integer_product(q, packed), q.int() @ w.int())


def test_what_a_device_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert refuses() or Int8Product().unavailable(33, 20, cpu) == ""
    assert Native().unavailable(33, 20, cpu) == ""
    assert "multiple of 8" in Int8Product().unavailable(33, 20, cuda)
    assert "multiple of 16" in Fp8Product().unavailable(16, 24, cpu)
    assert "no int8 products on mps" in Int8Product().unavailable(16, 16, torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "8.9" in Fp8Product().unavailable(16, 16, cuda)
    with pytest.raises(CELoraError, match="did you mean 'int8'"):
        make_product("in8")


def test_where_8_bits_cannot_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    patch_all(monkeypatch, "celora.kernels.plain:one_by_one", lambda: True)
    patch_all(monkeypatch, "celora.kernels.plain:wrong_integers", lambda device: "")
    with monkeypatch.context() as patch:
        without(patch, "c", "onednn", operations=("pack_weight",))
        assert "number by number" in Int8Product().slow(cpu)
        assert Int8Product().slow(torch.device("cuda")) == Native().slow(cpu) == ""
    # as with AVX-VNNI: our kernel is there, and without it torch loops over single numbers
    pretend(monkeypatch, "pack_weight", there=True)
    assert Int8Product().slow(cpu) == ""
    assert Int8Product(copy=False).slow(cpu)
    patch_all(monkeypatch, "celora.kernels.plain:one_by_one", lambda: False)
    assert Int8Product(copy=False).slow(cpu) == ""


@pytest.mark.parametrize(("bits", "slow"), [(30.0, True), (1.5, False)])
def test_products_number_by_number_are_recognised(bits: float, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def took(contenders: dict[str, Any], *, repeats: int, device: torch.device) -> dict[str, dict[str, float]]:
        assert device.type == "cpu"  # also where a model would be on a GPU
        for call in contenders.values():
            call()
        return {"bits": {"time_ms": bits}, "whole": {"time_ms": 1.0}}

    patch_all(monkeypatch, "celora.machine.timing:interleaved", took)
    assert plain_module.one_by_one.__wrapped__() == slow


@pytest.mark.parametrize("limit", ["", "AVX2"])
def test_sums_that_overflow_are_not_used(limit: str) -> None:
    """On CPUs below VNNI, oneDNN adds pairs of products in 16 bits.

    If that overflows, celora refuses it, and only then.
    """
    script = (
        "import torch; from celora import CELoraError; from celora.numerics.products.int8 import Int8Product\n"
        "cpu, G, W = torch.device('cpu'), torch.rand(32, 64) + 1, torch.rand(64, 32) + 1\n"
        "most = torch.full((32, 64), 127, dtype=torch.int8)\n"
        "overflows = not (torch._int_mm(most, most.t().contiguous()) == 64 * 127**2).all()\n"
        "for copy in (True, False):\n"
        "    said = Int8Product(copy=copy).unavailable(64, 32, cpu)\n"
        "    try:\n"
        "        assert (Int8Product(copy=copy)(G, W) - G @ W).norm() / (G @ W).norm() < 0.01\n"
        "        assert not said and not (overflows and not copy)\n"
        "    except CELoraError:\n"
        "        assert overflows and 'sums overflow' in said, said\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    done = run(code, script, environment=environment | ({"ONEDNN_MAX_CPU_ISA": limit} if limit else {}))
    assert done.returncode == 0, done.stderr


def test_without_dot_products_torchs_integer_product_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    W, G = torch.randn(32, 16), torch.randn(8, 32)
    expected = reference.int8(G.double(), W.double())
    without(monkeypatch, "c", "onednn")
    if refuses():
        return
    product = Int8Product()
    estimate = product(G, W)
    assert isinstance(product._packed, Integers)
    assert (estimate - expected).norm() / expected.norm() < 3e-3


def test_only_our_kernel_takes_any_number_of_rows(path: str) -> None:
    """Other backends, like those of accelerators, have to set up a product for each new shape."""
    usual = select.grain(1000)
    assert usual > 1
    cpu = torch.device("cpu")
    gathers = available("pack_weight", cpu) and choose("pack_weight", cpu).name == "c"
    assert not gathers or path == "compiled"
    assert Int8Product().grain(1000, torch.device("cpu")) == (1 if gathers else usual)
    assert Int8Product().grain(1000, torch.device("cuda")) == Native().grain(1000, torch.device("cpu")) == usual
    assert Int8Product(copy=False).grain(1000, torch.device("cpu")) == usual


def test_scales_of_input_features_are_those_of_the_formula() -> None:
    """Two layers have one input, in two batches. Feature 1 is large, 2 never occurs, and nothing reads 3."""
    torch.manual_seed(0)
    x, weights = torch.randn(2, 40, 16, 12), [torch.randn(8, 12), 0.1 * torch.randn(20, 12)]
    x[..., 1] *= 300
    x[..., 2] = 0
    for weight in weights:
        weight[:, 3] = 0
    products = [Int8BothWays(), Int8BothWays()]
    for product, weight in zip(products, weights, strict=True):
        for batch in x:
            product.look(batch, weight)
    sizes = [product.take_sizes() or [] for product in products]
    assert products[0].take_sizes() is None
    levels = levels_together(sizes)
    of_input = x.double().square().mean((1, 2)).sqrt().amax(0)
    of_weights = torch.stack([w.double().square().mean(0).sqrt() for w in weights]).amax(0)
    r = of_input**0.4 / of_weights**0.6
    for product in products:
        product.follow_levels(levels)
    scales = [product._input_scale(torch.device("cpu")) for product in products]
    assert scales[0] is scales[1]
    known = [i for i in range(12) if i not in (2, 3)]
    expected = torch.ones(12, dtype=torch.float64)
    expected[known] = (r[known].median() / r[known]).clamp(max=1)
    expected[3] = (of_input[of_input > 0].median() / of_input[3]).clamp(max=1)
    assert expected[1] < 0.2
    torch.testing.assert_close(scales[0].double(), expected, rtol=2 ** (2 / 32) - 1, atol=0)


@pytest.mark.skipif(refuses(), reason="no 8-bit products here, which is tested above")
@pytest.mark.parametrize("factor", [1e-3, 1e-6, 0.0])
def test_features_with_small_weights_keep_their_bits_for_the_adapter(factor: float) -> None:
    """The base hardly reads features 0 and 1, but A's gradient does, from the same 8 bits. Feature 0 is large, too."""
    torch.manual_seed(0)
    x, weight = torch.randn(200, 64), torch.randn(48, 64)
    x[:, 0] *= 60
    weight[:, :2] *= factor
    product = Int8BothWays()
    product.look(x, weight)
    product.follow_levels(levels_together([product.take_sizes() or []]))
    y, expected = product.forward(x, weight, None), x @ weight.t()
    assert (y - expected).norm() < 0.02 * expected.norm()
    rows = product.latest_input(x, weight)
    assert rows is not None
    through = torch.randn(200, 8)
    gradient, right = rows.transposed_product(through, None), through.t() @ x
    assert ((gradient - right).norm(dim=0) < 0.05 * right.norm(dim=0)).all()


def test_what_is_not_finite_hides_no_size_of_a_feature() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(40, 16), torch.randn(32, 16)
    x[:, 1] *= 60
    expected = Int8BothWays()
    expected.look(x, weight)
    sizes = expected.take_sizes()
    assert sizes is not None
    for fault in (float("nan"), float("inf")):
        product = Int8BothWays()
        product.look(torch.full_like(x, fault), weight)
        assert product.take_sizes() is None  # so the next refresh looks again
        for batch in (x, torch.full_like(x, fault), x):
            product.look(batch, weight)
        assert product.take_sizes() == sizes
