"""Bases that others hold in 8 bits are multiplied from their own bytes, in both directions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import celora
from celora.kernels import plain
from celora.modeling.eight_bit import own_bytes
from celora.modeling.survey import survey
from celora.modeling.trial import trained_forward
from celora.runtime import gate as gating
from celora.runtime.attachment import require
from celora.settings.presets import PRESETS
from celora.weights.read import read
from layers import KINDS, make_adapted, make_base, make_layer
from machine import refuses
from patching import patch_all
from small import adapter, make_batch
from without import without

CPU = torch.device("cpu")
OTHERS = ["bitsandbytes 8-bit", "torchao int8"]
BOTH = celora.CELoraConfig(estimator="int8", forward="int8", rank=0, refresh_every=3, fused=True)
pytestmark = [
    pytest.mark.skipif(refuses(), reason="no 8-bit products here, which is tested in test_products"),
    pytest.mark.skipif(not plain.pays_with_integers(CPU), reason="bytes of others have no fast product here"),
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is an Enum subclass:UserWarning"),
]


def attached(kind: str, config: Any = BOTH) -> PeftModel:
    model = make_adapted(kind)
    celora.attach(model, config)
    return model.train()


def steps(model: nn.Module, number: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(number):
        model(**make_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def gradient(model: nn.Module) -> Tensor:
    model.zero_grad()
    model(**make_batch(0)).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=make_batch(9)["input_ids"]).logits
    return found


@pytest.mark.parametrize("kind", OTHERS)
def test_the_bytes_and_scales_are_the_weight(kind: str) -> None:
    layer = make_layer(kind)
    weight: Any = read(layer, torch.float32)
    q, scale = weight.integers
    assert (q.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (96,))
    assert q.data_ptr() == getattr(layer.weight, "qdata", layer.weight).data_ptr()
    torch.testing.assert_close(q.float() * scale[:, None], weight.detach(), rtol=1e-6, atol=0)
    layer(torch.randn(4, 128))  # bitsandbytes moves its scales
    again: Any = read(layer, torch.float32)
    assert again.integers[0].data_ptr() == q.data_ptr()
    assert again.integers[1].equal(scale)


def test_only_a_scale_for_each_output_serves_both_directions() -> None:
    assert [kind for kind in KINDS if own_bytes(make_layer(kind))] == [*OTHERS, "celora int8"]
    layer: Any = make_layer("torchao int8")
    point = layer.weight.zero_point
    assert point is not None
    assert own_bytes(layer)
    point[3] = 1
    assert not own_bytes(layer)
    point[3] = 0
    assert own_bytes(layer)
    layer.weight.act_pre_scale = torch.ones(128)
    assert read(layer).integers is None  # type: ignore[attr-defined]
    layer.weight.act_pre_scale, layer.weight.scale = None, torch.ones(1, 1)
    assert not own_bytes(layer)


@pytest.mark.parametrize("kind", OTHERS)
def test_both_directions_multiply_with_these_bytes_and_no_copy(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, model = attached(kind, "exact"), attached(kind)
    attachment = require(model)
    assert len(attachment.forwards) == 14
    where = {name: addresses(name, model) for name in attachment.grafts}
    steps(model, 4)
    assert not [name for name, graft in attachment.grafts.items() if graft.estimator.product.holds_copy]
    assert {name: addresses(name, model) for name in attachment.grafts} == where
    errors = [*attachment.relative_errors.values(), *attachment.forwards.errors.values()]
    assert len(errors) == 14 + 11  # the first q, k and v have no gradient to compute
    assert max(errors) < 0.02

    exact.load_state_dict(adapter(model), strict=False)
    attachment.set_modes(1)
    kinds = {type(read(layer.base)) for layer in survey(model).layers.values()}
    for stored in kinds:  # between refreshes, nothing is de-quantised
        monkeypatch.setattr(stored, "dense", None)
        monkeypatch.setattr(stored, "rows", None)
    found = gradient(model)
    monkeypatch.undo()
    assert torch.cosine_similarity(found, gradient(exact), dim=0) > 0.999


def addresses(name: str, model: PeftModel) -> int:
    layer: Any = model.get_submodule(name)
    weight = layer.get_base_layer().weight
    return int(getattr(weight, "qdata", weight).data_ptr())


@pytest.mark.parametrize("kind", OTHERS)
def test_evaluation_copies_detaching_and_saving(kind: str, tmp_path: Path) -> None:
    model = attached(kind)
    plain_logits = logits(make_adapted(kind))
    steps(model, 3)
    trained = logits(model)
    assert trained.equal(logits(model))
    copied = copy.deepcopy(model)
    assert logits(copied).equal(trained)
    require(copied).set_modes(1)
    require(model).set_modes(1)
    assert gradient(copied.train()).equal(gradient(model.train()))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert gradient(copied).equal(gradient(model))

    model.save_pretrained(tmp_path)
    celora.detach(model)
    again = PeftModel.from_pretrained(make_base(kind), tmp_path)
    assert logits(again).equal(logits(model))
    assert not trained.equal(logits(model))  # the 8-bit forward was in use
    torch.testing.assert_close(trained, logits(model), rtol=0.1, atol=0.1)
    assert not plain_logits.equal(logits(model))


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", OTHERS)
def test_compiled_it_computes_the_same(kind: str) -> None:
    layer = make_layer(kind)
    model: Any = nn.Sequential(layer)
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = kind == "bitsandbytes 8-bit", False
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)).train()
    celora.attach(model, BOTH)
    require(model).set_modes(1)
    x = torch.randn(32, 128)
    torch._dynamo.reset()
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-5)
    assert not trained_forward(layer, x).equal(layer(x))  # the 8-bit forward was in use


@pytest.mark.parametrize("kind", OTHERS)
def test_without_a_fast_product_of_such_bytes_the_forward_stays_its_own(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward then multiplies with a copy that celora's own kernel packs, if there is one."""
    without(monkeypatch, "torch", operations=("hold_both_ways",))
    assert not own_bytes(make_layer(kind))
    if refuses():
        return
    model = attached(kind)
    attachment = require(model)
    assert attachment.forwards == {}
    steps(model, 2)
    assert sum(graft.estimator.product.holds_copy for graft in attachment.grafts.values()) == 11


@pytest.mark.parametrize("kind", OTHERS)
def test_the_gate_times_these_bytes_and_the_layer_s_own_forward(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """celora's kernel for its own copies may be faster than the product of these bytes, or slower."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen: list[list[str]] = []
    own, in_8_bits = gating.trained_forward, plain.IntegersBothWays.multiply

    def ratios(contenders: Mapping[str, Callable[[], object]], **_: Any) -> dict[str, float]:
        for call in contenders.values():
            seen.append([])
            call()
        return {name: 1.0 - 0.1 * (name == "1") for name in contenders}

    def noting(name: str, before: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: seen[-1].append(name) or before(*args)

    patch_all(monkeypatch, "celora.machine.timing:ratios", ratios)
    monkeypatch.setattr(gating, "trained_forward", noting("own", own))
    monkeypatch.setattr(plain.IntegersBothWays, "multiply", noting("8 bits", in_8_bits))
    model = make_adapted(kind)
    config = gating.gate(survey(model), PRESETS["fast"]).config
    assert seen == [["own"], ["8 bits"], ["own"], ["own"]] * 4  # four shapes; `fast` is the first after `exact`
    assert {config.for_layer(name).forward for name in survey(model).layers} == {"int8"}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_version_of_the_package_is_timed_anew(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It computes the exact forward that the gate compares with."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    timed: list[int] = []

    def ratios(contenders: Mapping[str, Callable[[], object]], **_: Any) -> dict[str, float]:
        timed.append(len(contenders))
        return dict.fromkeys(contenders, 1.0)

    patch_all(monkeypatch, "celora.machine.timing:ratios", ratios)
    monkeypatch.setattr(gating, "disturbed", lambda _: "")
    found, version = survey(make_adapted(kind)), gating.package_version
    for _ in range(2):
        gating.gate(found, PRESETS["fast"])
    assert len(timed) == 4
    package = kind.split()[0]
    monkeypatch.setattr(gating, "package_version", lambda name: "0" if name == package else version(name))
    gating.gate(found, PRESETS["fast"])
    assert len(timed) == 8
