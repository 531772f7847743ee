"""Training with celora and features of PEFT and PyTorch: checkpoints, biases, half precision, merging, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel

import celora
from celora import CELoraConfig
from celora.modeling.switch import Mode
from celora.runtime.attachment import require
from machine import refuses_config
from small import MEMBERS, adapter, make_batch, make_model, train
from tolerances import after_adam
from versions import before

HALF = CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=3)


@pytest.mark.parametrize("config", MEMBERS.values(), ids=MEMBERS)
def test_checkpointing_changes_nothing(config: CELoraConfig) -> None:
    if refuses_config(config):
        return
    results = []
    for use_reentrant in (None, True, False):
        model = make_model(dtype=torch.float64)
        model.enable_input_require_grads()
        if use_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        celora.attach(model, config)
        train(model, 5)
        results.append(adapter(model))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=after_adam(5, lr=1e-2))


# peft 0.21 warns about the shape of every `lora_B.bias` that it has itself saved, and loads it all the same.
@pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape")
@pytest.mark.parametrize("biases", [{"bias": "lora_only"}, {"lora_bias": True}, {"bias": "all"}])
def test_trainable_biases_train_save_and_reload(biases: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(base_bias=True, **biases)
    celora.attach(model, HALF)
    untrained = adapter(model)
    assert any("bias" in name or "lora_B.default.bias" in name for name in untrained)
    train(model, 5)
    assert all(not value.equal(untrained[name]) for name, value in adapter(model).items() if "bias" in name)
    if biases != {"bias": "lora_only"} or not before("peft", "0.21"):  # the first that loads this again
        _assert_reloads(model, tmp_path, base_bias=True)


def _biased() -> PeftModel:
    return make_model(base_bias=True, bias="lora_only")


def test_a_trainable_bias_gets_its_exact_gradient(batch: dict[str, torch.Tensor]) -> None:
    """The gradient at the last layer is exact, even if others are estimated. So its bias must match plain PEFT's."""
    plain, estimated = _biased(), _biased()
    celora.attach(estimated, HALF)
    require(estimated).clock.advance()
    for graft in require(estimated).grafts.values():
        graft.mode = Mode.OBSERVE
    estimated(**batch).loss.backward()
    estimated.zero_grad()
    require(estimated).clock.advance()
    for model in (plain, estimated):
        model(**batch).loss.backward()
    name = "base_model.model.model.layers.1.mlp.down_proj.base_layer.bias"
    grads = [dict(m.named_parameters())[name].grad for m in (plain, estimated)]
    torch.testing.assert_close(*grads)


def test_reloads_in_stock_peft_after_twenty_steps(model: PeftModel, tmp_path: Path) -> None:
    celora.attach(model, HALF)
    train(model, 20)
    _assert_reloads(model, tmp_path)


def _assert_reloads(model: PeftModel, folder: Path, **kwargs: Any) -> None:
    """PEFT alone loads the saved adapter onto a rebuilt base, and gives the same logits."""
    model.eval()
    model.save_pretrained(folder)
    assert {p.name for p in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert "celora" not in (folder / "adapter_config.json").read_text()
    base = make_model(**kwargs).unload()
    stock = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(**make_batch(7)).logits, model(**make_batch(7)).logits, rtol=0, atol=1e-5)


MOVING = {
    "columns": CELoraConfig(estimator="columns", keep_ratio=0.5, rank=4, refresh_every=4, fused=True),
    "int8": CELoraConfig(estimator="int8", refresh_every=4, fused=True),
}


@pytest.mark.parametrize("name", MOVING)
def test_training_after_unmerging_goes_on_as_if_nothing_had_been_merged(name: str) -> None:
    """Merges between two refreshes, and trains past the next one.

    In float64, because PEFT adds to the weight and subtracts.
    """
    if refuses_config(MOVING[name]):
        return
    results = []
    for merges in (False, True):
        model = make_model(dtype=torch.float64)
        celora.attach(model, MOVING[name])
        optimizer = train(model, 6)
        if merges:
            with torch.no_grad():
                model.eval()
                expected = model(**make_batch(99)).logits
                model.merge_adapter()
                torch.testing.assert_close(model(**make_batch(99)).logits, expected)
                model.unmerge_adapter()
        assert {graft.mode for graft in require(model).grafts.values() if graft.estimator.ready} == {Mode.ESTIMATE}
        train(model, 6, first=6, optimizer=optimizer)
        results.append(adapter(model))
    for parameter, expected in results[0].items():
        torch.testing.assert_close(results[1][parameter], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", MOVING)
def test_an_adapter_switched_to_trains_as_the_only_one(name: str) -> None:
    """From the next refresh on, its own gradients are estimated. Nothing of the other adapter is left."""
    if refuses_config(MOVING[name]):
        return
    results = []
    for config, switches in (("off", False), (MOVING[name], False), (MOVING[name], True)):
        model = make_model()
        torch.manual_seed(7)
        model.add_adapter("other", LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
        celora.attach(model, config)
        optimizer = torch.optim.AdamW([p for key, p in model.named_parameters() if "lora_" in key], lr=1e-2)
        if switches:
            train(model, 8, optimizer=optimizer)
        first = adapter(model)
        model.set_adapter("other")
        train(model, 8, first=8, optimizer=optimizer)
        results.append(adapter(model))
        model.set_adapter("default")
        assert all(value.equal(first[key]) for key, value in adapter(model).items())
    plain, alone, after = results
    assert plain.keys() == alone.keys() == after.keys()
    assert all(value.equal(after[key]) for key, value in alone.items())
    assert any(not value.allclose(plain[key], rtol=1e-3, atol=1e-3) for key, value in alone.items())


def test_saved_for_backward_bytes_are_those_of_plain_peft(model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
    def saved() -> int:
        total = 0

        def pack(t: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(**batch)
        return total

    plain = saved()
    celora.attach(model, HALF)
    refreshing = saved()
    train(model, 1)
    assert require(model).grafts["base_model.model.model.layers.1.mlp.up_proj"].mode is Mode.ESTIMATE
    assert max(refreshing, saved()) <= plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trains_in_half_precision(dtype: torch.dtype) -> None:
    model = make_model(dtype=dtype)
    celora.attach(model, HALF)
    train(model, 5)
    assert all(torch.isfinite(value).all() for value in adapter(model).values())


@pytest.mark.parametrize("config", MEMBERS.values(), ids=MEMBERS)
def test_every_member_of_the_family_trains_with_accumulation_and_resumes(config: CELoraConfig, tmp_path: Path) -> None:
    if refuses_config(config):
        return
    first, second = make_model(), make_model()
    report = celora.attach(first, config)
    assert len(report.estimated) == 14
    str(report)
    train(first, 8, accumulate=2)
    celora.attach(second, config)
    optimizer = train(second, 4, accumulate=2)
    celora.save_state(second, tmp_path)
    celora.attach(second, "off")
    celora.attach(second, config)
    celora.load_state(second, tmp_path)
    train(second, 4, first=4, accumulate=2, optimizer=optimizer)
    found = adapter(second)
    for name, value in adapter(first).items():
        assert value.equal(found[name]), name
    plain = make_model()
    train(plain, 8, accumulate=2)
    found = adapter(plain)
    assert not all(value.equal(found[name]) for name, value in adapter(first).items())


@pytest.mark.parametrize("config", MEMBERS.values(), ids=MEMBERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_member_of_the_family_in_half_precision_with_bias(config: CELoraConfig, dtype: torch.dtype) -> None:
    if refuses_config(config):
        return
    model = make_model(dtype=dtype, base_bias=True)
    celora.attach(model, config)
    train(model, 5)
    assert all(value.isfinite().all() for value in adapter(model).values())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("member", ["int8", "int8 both ways", "int8 x tokens", "sampled tokens", "spread"])
def test_checkpointing_changes_nothing_for_any_member(member: str, reentrant: bool) -> None:
    if refuses_config(MEMBERS[member]):
        return
    models = make_model(dtype=torch.float64), make_model(dtype=torch.float64)
    models[1].enable_input_require_grads()
    models[1].gradient_checkpointing_enable({"use_reentrant": reentrant})
    models[0].enable_input_require_grads()
    for model in models:
        celora.attach(model, MEMBERS[member])
        train(model, 5)
    for name, value in adapter(models[0]).items():
        torch.testing.assert_close(value, adapter(models[1])[name], rtol=0, atol=after_adam(5, lr=1e-2))
