"""The forward of frozen float32 layers by another library than torch's own: its results, and when it is not used."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import celora
from celora import CELoraConfig
from celora.borrowed import borrow
from celora.kernels import onednn
from celora.modeling.float_forward import FloatForward
from celora.modeling.switch import Mode
from celora.runtime.attachment import require
from layers import conv1d
from lora_layer import layer, run
from machine import refuses
from patching import patch_all
from small import make_batch, make_model

pytestmark = pytest.mark.skipif(borrow(onednn._LINEAR) is None, reason="torch has no float32 linear of oneDNN here")

# The forward, two products of the adapter, four of its backward, and two of the layer's, as this is a refresh.
OF_ONE_LAYER = 9


@pytest.fixture(autouse=True)
def _such_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_all(monkeypatch, "celora.machine.cpu:wider_than_mkl", lambda: True)


def test_a_shallow_copy_with_another_weight_computes_with_it() -> None:
    """Quantisers replace layers so. The old layer may be gone, or still be used."""
    for keeps in (False, True):
        model = make_model().train()
        celora.attach(model, "exact")
        gradients(model)
        tuner = model.base_model.model.model.layers[1].mlp.up_proj
        old, tuner.base_layer = tuner.base_layer, copy.copy(tuner.base_layer)
        tuner.base_layer._parameters = {**old._parameters, "weight": nn.Parameter(2 * old.weight, requires_grad=False)}
        before = old if keeps else None
        del old
        found = gradients(model)
        ones = torch.ones(1, tuner.in_features)
        if before is not None:
            torch.testing.assert_close(before(ones), nn.functional.linear(ones, before.weight))
        again = gradients(model)
        celora.detach(model)
        expected = gradients(model)
        same(found, expected)
        same(again, expected)


def products(call: Callable[[], object], *, wider_than: int = 0) -> int:
    """How many products oneDNN computes in this call, of operands with all sides larger than this."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        call()
    found = [event.input_shapes for event in seen.events() if event.name == "mkldnn::_linear_pointwise"]
    return sum(min(*x[-2:], *weight) > wider_than for x, weight, *_ in found)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(**make_batch(0)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize("base_bias", [False, True])
def test_a_model_learns_what_it_learns_without(base_bias: bool) -> None:
    plain, model = make_model(base_bias=base_bias).train(), make_model(base_bias=base_bias).train()
    report = celora.attach(model, "exact")
    assert "Float32 products are oneDNN's: on this CPU they are faster than torch's own." in report.notes
    same(gradients(model), gradients(plain))
    layers = [module for module in model.modules() if isinstance(module.__dict__.get("forward"), FloatForward)]
    assert len(layers) == 14 + 1  # the head, which computes its own in evaluation
    # The adapters' rank is 8. The first three layers' input needs no gradient, and the head has two products.
    assert products(lambda: gradients(model), wider_than=8) >= 14 + 11 + 2


def test_one_layer_and_the_gradient_of_its_bias() -> None:
    x, g = torch.randn(100, 12), torch.randn(100, 20)
    plain = layer(dtype=torch.float32, bias=True)
    plain.base_model.model[0].base_layer.bias.requires_grad_()
    model = copy.deepcopy(plain)
    expected = run(plain, x, g)
    celora.attach(model, "exact")
    same(run(model, x, g), expected)
    assert products(lambda: run(model, x, g)) == OF_ONE_LAYER


def test_the_layer_of_gpt_2() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(conv1d(nn.Linear(12, 20)))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"], fan_in_fan_out=True, init_lora_weights=False))
    x, g = torch.randn(100, 12), torch.randn(100, 20)
    expected = run(model.train(), x, g)
    celora.attach(model, "exact")
    same(run(model, x, g), expected)
    assert products(lambda: run(model, x, g)) == OF_ONE_LAYER


def test_evaluation_and_detached_models_have_the_bits_that_they_had() -> None:
    model = make_model().train()
    with torch.no_grad():
        expected = model.eval()(**make_batch(0)).logits
    celora.attach(model.train(), "exact")
    assert products(lambda: gradients(model)) > 0
    model.eval()
    with torch.no_grad():
        assert model(**make_batch(0)).logits.equal(expected)
        assert products(lambda: model(**make_batch(0))) == 0
    celora.detach(model)
    assert not any(isinstance(module.__dict__.get("forward"), FloatForward) for module in model.modules())
    assert products(lambda: gradients(model.train())) == 0


def test_autocast_no_tokens_and_weights_that_train_are_the_layer_s_own() -> None:
    x, model = torch.randn(100, 12), layer(dtype=torch.float32)
    celora.attach(model, "exact")
    base = model.base_model.model[0].base_layer
    assert products(lambda: base(x)) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert base(x).dtype == torch.bfloat16
        assert products(lambda: base(x)) == 0
    assert products(lambda: base(x[:0])) == 0
    for given in (x, x.view(2, 50, 12)):
        base(given.requires_grad_()).mul_(2)  # as of any linear layer
    base.weight.requires_grad_()
    assert products(lambda: base(x)) == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_repeats_it(reentrant: bool) -> None:
    x, g = torch.randn(100, 12), torch.randn(100, 20)
    plain = layer(dtype=torch.float32)
    model, given = copy.deepcopy(plain), x.clone().requires_grad_()
    expected = run(plain, x, g)
    celora.attach(model, "exact")

    def twice() -> None:
        checkpoint(model, given, use_reentrant=reentrant).backward(g)

    assert products(twice) == OF_ONE_LAYER + 3  # the forward's three are repeated
    found = {"output": expected["output"], "x": given.grad}
    same(found | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, expected)


def test_a_copy_and_a_file_have_their_own() -> None:
    x, g = torch.randn(100, 12), torch.randn(100, 20)
    model: PeftModel = layer(dtype=torch.float32)
    celora.attach(model, "exact")
    expected = run(model, x, g)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        base = twin.base_model.model[0].base_layer
        with FlopCounterMode(display=False):  # nothing is tried while something looks at every operator
            assert products(lambda twin=twin: twin(x), wider_than=4) == 0
        assert run(twin, x, g)["output"].equal(expected["output"])
        with torch.no_grad():
            base.weight.mul_(2)
        first = run(twin, x, g)["output"]
        assert not torch.allclose(first, expected["output"])
        torch.testing.assert_close(run(twin, x, g)["output"], first)
    same(run(model, x, g), expected)


@pytest.mark.parametrize("shape", [(12,), (2, 50, 12)])
def test_inputs_of_other_dimensions_and_a_bias_that_trains(shape: tuple[int, ...]) -> None:
    plain = layer(dtype=torch.float32).base_model.model[0].base_layer
    plain.bias.requires_grad_()
    model: PeftModel = layer(dtype=torch.float32)
    celora.attach(model, "exact")
    base = model.base_model.model[0].base_layer
    base.bias.requires_grad_()
    x = torch.randn(shape)
    for one in (plain, base):
        one.train()(x).square().sum().backward()
    torch.testing.assert_close(base.bias.grad, plain.bias.grad)


def test_a_machine_of_several_accelerators_keeps_the_class_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """`nn.DataParallel` may copy the model, and the copies would call the forward of the original."""
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    model = layer(dtype=torch.float32)
    celora.attach(model, "exact")
    assert not any(isinstance(module.__dict__.get("forward"), FloatForward) for module in model.modules())


@pytest.mark.parametrize("offload", [False, True])
def test_a_wrapper_that_comes_later_calls_the_class_s(offload: bool) -> None:
    """accelerate may put other weights in for each call. The layer is estimated as before, if they are in memory."""
    x, g, model = torch.randn(100, 12), torch.randn(100, 20), layer(dtype=torch.float32)
    expected = run(model, x, g)
    celora.attach(model, "exact")
    base = model.base_model.model[0].base_layer
    weights = dict(base.state_dict()) if offload else None
    add_hook_to_module(base, AlignDevicesHook(execution_device="cpu", offload=offload, weights_map=weights))
    said = pytest.warns(UserWarning, match="is offloaded") if offload else contextlib.nullcontext()
    with said:
        same(run(model, x, g), expected)
    assert products(lambda: model(x), wider_than=4) == 0
    assert offload or celora.attach(model, "exact").skipped == {}


def test_other_presets_say_nothing_of_it() -> None:
    for preset, dtype in (("off", torch.float32), ("exact", torch.bfloat16), ("fast", torch.bfloat16)):
        assert "oneDNN" not in str(celora.attach(make_model(dtype=dtype), preset))


def test_a_forward_in_8_bits_that_was_given_up_is_in_float32() -> None:
    if refuses():
        return
    x, model = torch.randn(100, 48), layer(32, 48, dtype=torch.float32)
    expected = model(x)
    celora.attach(model, CELoraConfig(estimator="int8", forward="int8", fused=True))
    for graft in require(model).grafts.values():
        graft.mode = Mode.ESTIMATE  # a refresh compares with the exact product
    assert not torch.allclose(model(x), expected)
    assert products(lambda: model(x), wider_than=4) == 0
    (forward,) = require(model).forwards.values()
    forward.give_up()
    torch.testing.assert_close(model(x), expected)
    assert products(lambda: model(x), wider_than=4) == 1


def test_a_class_that_changes_later_computes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    x, model = torch.randn(100, 12), layer(dtype=torch.float32)
    celora.attach(model, "exact")
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: torch.nn.functional.linear(x, self.weight * 2))
    for one in (model, copy.deepcopy(model)):
        base = one.base_model.model[0].base_layer
        with pytest.warns(UserWarning, match="does not compute"):
            assert products(lambda base=base: base(x)) == 0
        torch.testing.assert_close(base(x), 2 * x @ base.weight.t())
