"""A linear layer in 8 bits: its results, moves, copies and merging."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from celora import CELoraError
from celora.kernels.backends import TABLE, Backend
from celora.kernels.operations import available
from celora.kernels.plain import IntegersBothWays
from celora.kernels.triton.product import TiledBothWays
from celora.machine import cpu
from celora.machine.memory import saved_for_backward
from celora.modeling import int8_linear
from celora.modeling.int8_linear import Int8Linear
from celora.numerics import reference
from celora.numerics.estimators import Int8
from celora.numerics.products.both_ways import Int8BothWays, levels_together
from celora.weights.checkpoint import Origin
from celora.weights.read import read
from machine import refuses
from patching import patch_all
from tiers import WITH_DOTS, use_tier
from without import without

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(out: int = 33, inp: int = 50, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inp, out, bias=bias, dtype=dtype)


def dense(layer: nn.Linear) -> Tensor:
    q, s = reference.quantise(layer.weight.detach().double(), 1)
    return q * s


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(7,), (2, 3, 4)])
def test_products_are_exact_for_the_quantised_weight(dtype: torch.dtype, bias: bool, lead: tuple[int, ...]) -> None:
    linear = make(dtype=dtype, bias=bias)
    layer, W = Int8Linear.of(linear), dense(linear)
    x = torch.randn(*lead, 50).to(dtype).requires_grad_()
    g = torch.randn(*lead, 33).to(dtype)
    y = layer(x)
    y.backward(g)
    expected = x.detach().double() @ W.T + (linear.bias.detach().double() if bias else 0)
    assert (y.dtype, y.shape) == (dtype, expected.shape)
    assert x.grad is not None
    # The weight is rounded to the dtype, multiplied, and summed in float32.
    tolerance = 4 * torch.finfo(dtype).eps
    for found, exact in ((y.double(), expected), (x.grad.double(), g.double() @ W)):
        assert (found - exact).norm() <= tolerance * exact.norm()
    if bias:
        assert layer.bias is linear.bias
        torch.testing.assert_close(layer.bias.grad, g.reshape(-1, 33).sum(0))


def test_the_bytes_are_those_of_the_reference() -> None:
    linear = make(40, 64)
    q, s = reference.quantise(linear.weight.detach().double(), 1)
    layer = Int8Linear.of(linear)
    assert (layer.packed.integers().double() - q).abs().max() <= 1  # ties may round either way
    torch.testing.assert_close(layer.scale.double(), s[:, 0], rtol=1e-6, atol=0)
    index = torch.tensor([0, 17, 39])
    assert layer.packed.integers(index).equal(layer.packed.integers()[index])
    assert layer.dequantize().equal(layer.packed.dense())


def test_a_byte_a_number_is_all_that_is_held_and_saved() -> None:
    layer = Int8Linear.of(make(256, 512, bias=False))
    held = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
    assert held == 256 * 512 + 256 * 4
    x = torch.randn(3, 512, requires_grad=True)
    with saved_for_backward(nn.Sequential(layer)) as saved:
        layer(x).sum().backward()
    # the scale is a buffer; the bytes are a parameter, and parameters do not count
    assert saved.nbytes == layer.scale.nbytes


def test_zeros_and_extremes() -> None:
    linear = make(bias=False)
    with torch.no_grad():
        linear.weight[3] = 0
        linear.weight[4] = 1e-30
        linear.weight[5] = 1e30
    layer = Int8Linear.of(linear)
    y = layer(torch.eye(50))
    torch.testing.assert_close(y.T, dense(linear).float(), rtol=1e-5, atol=0)
    linear.weight.data[6, 0] = float("inf")
    with pytest.raises(CELoraError, match="not finite"):
        Int8Linear.of(linear)


def test_8_bit_products_multiply_with_its_bytes_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    if refuses():
        return
    layer, estimator = Int8Linear.of(make(96, 128, bias=False)), Int8(96, 128)
    weight = read(layer)
    monkeypatch.setattr(type(weight), "dense", None)
    monkeypatch.setattr(type(weight), "to", None)
    assert estimator.product._multiplied_with(weight).stored.data_ptr() == layer.W_q.data_ptr()
    estimator.estimate(torch.randn(40, 96), weight)
    assert not estimator.product.holds_copy


@pytest.mark.skipif(refuses(), reason="no 8-bit products here, which is tested in test_products")
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_features_of_an_input_are_multiplied_apart(dtype: torch.dtype) -> None:
    """Its bytes cannot be scaled. Rounded with the others, eight features of 200 times their size would hide them."""
    layer, product = Int8Linear.of(make(96, 128, dtype=dtype)), Int8BothWays()
    weight, exact, large = read(layer), dense(make(96, 128, dtype=dtype)), torch.arange(3, 128, 16)
    x, p = torch.randn(40, 128), torch.randn(40, 4)
    x[:, large] *= 200
    x = x.to(dtype)
    expected = x.double() @ exact.T + layer.bias.detach().double()
    before = product.forward(x, weight, layer.bias)
    product.look(x, weight)
    product.follow_levels(levels_together([product.take_sizes() or []]))
    y, rows = product.forward(x, weight, layer.bias), product.latest_input(x, weight)
    assert rows is not None
    assert rows.apart is not None
    assert rows.values is not None
    assert sorted(rows.apart.tolist()) == large.tolist()
    assert torch.equal(rows.values, x[:, rows.apart])
    assert not rows.q[:, large].any()

    small = [i for i in range(128) if i not in large.tolist()]
    step = x[:, small].double().abs().amax(1, keepdim=True) / 127
    # A number is off by a step at most, where AVX2 takes two neighbours for the step, and by 0.58 in the mean square.
    rounding = (4 * step * exact[:, small].norm(dim=1)).amax()
    most = rounding + 4 * torch.finfo(dtype).eps * expected.abs().amax()
    assert (y.double() - expected).abs().amax() <= most
    assert (before.double() - expected).norm() > 3 * (y.double() - expected).norm()
    for mask in (None, torch.rand(40, 128) < 0.7):
        found = rows.transposed_product(p, mask).double()
        right = p.double().T @ (x.double() if mask is None else x.double() * mask)
        assert ((found - right).norm(dim=0) <= 0.05 * right.norm(dim=0) + 0.05).all()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_scales_stay_float32_in_every_dtype(dtype: torch.dtype) -> None:
    layer = Int8Linear.of(make())
    scale, before = layer.scale.clone(), layer.packed.integers().clone()
    layer.to(dtype)
    assert layer.scale.dtype == torch.float32
    assert layer.scale.equal(scale)
    assert layer.packed.integers().equal(before)
    assert (layer.dtype, layer.weight.dtype, layer.bias.dtype) == (dtype, dtype, dtype)


def test_autocast_computes_in_its_dtype() -> None:
    layer, x = Int8Linear.of(make()), torch.randn(4, 50)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, layer(x.bfloat16()), rtol=0, atol=0)


def test_copies_and_pickles_compute_the_same() -> None:
    layer, x = Int8Linear.of(make()), torch.randn(4, 50)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for other in (copy.deepcopy(layer), torch.load(stream, weights_only=False)):
        assert other(x).equal(layer(x))
        assert other.W_q.data_ptr() != layer.W_q.data_ptr()
    other = Int8Linear.of(make(bias=True))
    other.W_q.data.zero_()
    other.load_state_dict(layer.state_dict())
    assert other(x).equal(layer(x))


@pytest.mark.parametrize("later", [*WITH_DOTS, None])
@pytest.mark.parametrize("earlier", [*WITH_DOTS, None])
def test_what_one_machine_saved_another_multiplies_with(
    earlier: str | None, later: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tier of kernels, and torch alone, has a layout of its own."""

    def compute_with(tier: str | None) -> None:
        if tier is None:
            patch_all(monkeypatch, "celora.kernels.c.library:library", lambda: None)
        else:
            use_tier(monkeypatch, tier)
            monkeypatch.setattr(cpu, "matrix_instructions", lambda: tier == "amx")

    x, stream = torch.randn(4, 150), io.BytesIO()
    compute_with(earlier)
    saved = Int8Linear.of(make(97, 150))
    expected, integers = saved(x), saved.packed.integers()
    torch.save(saved, stream)
    stream.seek(0)
    compute_with(later)
    loaded = torch.load(stream, weights_only=False)
    assert loaded.packed.integers().equal(integers)
    torch.testing.assert_close(loaded(x), expected)
    if available("pack_both_ways", x.device):
        found = loaded.packed.multiply(loaded.packed.quantise(x), loaded.bias, torch.empty(4, 97))
        assert (found - expected).norm() < 0.03 * expected.norm()


def test_bytes_by_rows_are_multiplied_by_what_the_device_at_hand_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A layer may come from another device."""
    without(monkeypatch, "c")
    layer = Int8Linear.of(make(96, 128))
    assert layer.layout is IntegersBothWays
    other = Backend("triton", TiledBothWays.holding)
    with monkeypatch.context() as patch:
        patch.setitem(TABLE, "hold_both_ways", [other])
        assert type(layer.packed) is TiledBothWays
        assert layer.packed.stored.data_ptr() == layer.W_q.data_ptr()
    layer.layout = TiledBothWays
    monkeypatch.setitem(TABLE, "hold_both_ways", [Backend("torch", IntegersBothWays.holding)])
    assert type(layer.packed) is IntegersBothWays


def test_without_kernels_it_computes_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = make(), torch.randn(4, 50)
    expected = Int8Linear.of(linear)(x)
    monkeypatch.setattr(int8_linear, "available", lambda operation, device: False)
    layer = Int8Linear.of(linear)
    assert layer.W_q.shape == (33, 50)
    assert layer.weight.packed is None
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
def test_torch_compile_takes_it_in_without_a_break() -> None:
    layer, x = Int8Linear.of(make()), torch.randn(4, 50, requires_grad=True)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    compiled(x).sum().backward()
    found, x.grad = x.grad, None
    layer(x).sum().backward()
    torch.testing.assert_close(found, x.grad)


def stored(folder: Path, linear: nn.Linear) -> Origin:
    save_file({"inner.up.weight": linear.weight.detach()}, folder / "model.safetensors")
    return Origin(str(folder), None, "model.inner.up.weight")


@pytest.mark.parametrize("safe", [False, True])
def test_merging_puts_the_original_weight_back(tmp_path: Path, safe: bool) -> None:
    linear = make(dtype=torch.bfloat16)
    original = linear.weight.detach().clone()
    layer = Int8Linear.of(linear)
    layer.origin = stored(tmp_path, linear)
    model = get_peft_model(nn.Sequential(layer), LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    lora = model.base_model.model[0]
    delta = lora.get_delta_weight("default")
    merged = model.merge_and_unload(safe_merge=safe)[0]
    assert type(merged) is nn.Linear
    expected = (original.float() + delta.detach()).bfloat16()
    torch.testing.assert_close(merged.weight.detach(), expected, rtol=2**-7, atol=2**-8)  # one step of bfloat16 near 1
    assert not merged.weight.requires_grad
    assert [name for name, _ in merged.named_parameters()] == ["bias", "weight"]


def test_merging_is_refused_where_the_original_is_not_at_hand(tmp_path: Path) -> None:
    linear = make()
    layer = Int8Linear.of(linear)
    with pytest.raises(CELoraError, match=r"not known where .* load the model in its own dtype"):
        layer.weight.data  # noqa: B018
    layer.origin = stored(tmp_path, make(out=34))
    with pytest.raises(CELoraError, match="another shape"):
        layer.original()
    torch.manual_seed(1)
    layer.origin = stored(tmp_path, nn.Linear(50, 33))
    with pytest.raises(CELoraError, match="is not the weight that was quantised"):
        layer.original()
    layer.origin = stored(tmp_path, linear)
    assert layer.original().equal(linear.weight)


def test_a_layer_on_its_original_weight(tmp_path: Path) -> None:
    linear, x = make(), torch.randn(3, 50, requires_grad=True)
    layer = Int8Linear.of(linear)
    layer.origin, layer.on_original = stored(tmp_path, linear), layer.original
    assert layer(x).equal(linear(x))
    (found,), (expected,) = (torch.autograd.grad(one(x).sum(), x) for one in (layer, linear))
    assert found.equal(expected)


@pytest.mark.parametrize("reads", [Int8Linear.original, Int8Linear.read_again])
def test_a_compiler_does_not_trace_the_reading_of_the_original(
    reads: Callable[[Int8Linear], torch.Tensor], tmp_path: Path
) -> None:
    """Its graphs would be of parts of the reader and of the kernels' launches, made again for each layer."""
    linear, x, graphs = make(), torch.randn(3, 50), []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    layer = Int8Linear.of(linear)
    layer.origin, layer.on_original = stored(tmp_path, linear), partial(reads, layer)
    torch.compiler.reset()
    assert torch.compile(layer, backend=count)(x).equal(linear(x))
    assert len(graphs) == 1


def test_bytes_that_were_moved_with_another_devices_layout_are_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """As FSDP2 moves them, which sees parameters only. The layer itself still knows its weight."""
    layer, expected = Int8Linear.of(make(bias=False)), Int8Linear.of(make(bias=False)).dequantize()
    monkeypatch.setattr(layer.layout, "fits", lambda *_: False)
    weight: Any = read(layer)
    assert weight.packed is None
    assert weight.dense().equal(expected)


def test_moved_to_where_nothing_multiplies_8_bits() -> None:
    layer = Int8Linear.of(make()).to("meta")
    assert layer.weight.is_meta
    assert available("pack_both_ways", torch.device("meta")) is False
