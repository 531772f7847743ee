"""A survey finds a model's layers and its language model. It says why a layer cannot be estimated or fused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import AdaLoraConfig, AdaptionPromptConfig, IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

import celora
from celora import CELoraError
from celora.modeling.survey import LayerAdapter, survey
from layers import bits_and_bytes_4
from small import make_base, make_model, mixed_model

UP = "base_model.model.model.layers.0.mlp.up_proj"


def test_a_plain_model() -> None:
    model = make_model(dtype=torch.bfloat16, lora_dropout=0.25)
    found = survey(model)
    assert found.model is model
    assert len(found.layers) == 14
    assert [layer.name for layer in found.layers.values()] == list(found.layers)
    layer = found.layers[UP]
    assert layer.module is model.get_submodule(UP)
    assert layer.base is layer.module.get_base_layer()
    assert layer.shape == (layer.out_features, layer.in_features) == (80, 48)
    assert (layer.dtype, layer.device, layer.quantised) == (torch.bfloat16, torch.device("cpu"), "")
    assert layer.cannot_estimate == layer.cannot_fuse == found.cannot_score == ""
    assert layer.adapters == (LayerAdapter("default", active=True, rank=8, dtype=torch.float32, dropout=0.25),)
    assert layer.rank == 8
    around = found.language_model
    assert around is not None
    assert around.causal is model.base_model.model
    assert around.head is model.base_model.model.lm_head
    assert around.cannot_pack == ""


def test_it_is_the_same_once_celora_is_attached() -> None:
    """Attaching again then finds what it found before. A survey also repairs what an interrupted forward left."""
    model = make_model().train()
    before = survey(model)
    celora.attach(model, "exact")
    assert survey(model) == before
    handle = model.base_model.model.model.layers[1].register_forward_pre_hook(_interrupt)
    lender = model.get_submodule(UP).register_forward_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=torch.randint(0, 61, (16, 12)))
    handle.remove()
    lender.remove()
    assert survey(model) == before


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_it_is_plain_data() -> None:
    found = survey(make_model())
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.layers[UP].name = "other"  # type: ignore[misc]


def test_why_a_layer_cannot_be_estimated_or_fused() -> None:
    model = make_model()
    names = [f"base_model.model.model.layers.0.self_attn.{letter}_proj" for letter in "qkvo"]
    trained, replaced, hooked, apart = (model.get_submodule(name) for name in names)
    trained.get_base_layer().weight.requires_grad_()
    replaced.get_base_layer().forward = lambda x: x
    hooked.get_base_layer().register_forward_pre_hook(_interrupt)
    apart.lora_A["default"].register_forward_hook(_interrupt)
    layers = survey(model).layers
    reasons = [(layers[name].cannot_estimate, layers[name].cannot_fuse) for name in names]
    assert reasons[0] == ("its weight is trained",) * 2
    assert reasons[1] == ("its forward was replaced",) * 2
    assert reasons[2] == ("it has a forward hook of another's (_interrupt)",) * 2
    assert reasons[3] == ("", "its adapter has hooks of its own")
    assert [layers[name].device for name in names] == [
        torch.device(device) for device in ("meta", "meta", "meta", "cpu")
    ]


def test_quantised_layers_are_named() -> None:
    base = make_base()
    base.model.layers[0].mlp.up_proj = bits_and_bytes_4(base.model.layers[0].mlp.up_proj)
    layers = survey(get_peft_model(base, LoraConfig(target_modules=["up_proj"]))).layers
    assert [(layer.quantised, layer.shape) for layer in layers.values()] == [("Linear4bit", (80, 48)), ("", (80, 48))]


def test_adapters_that_are_active_come_first() -> None:
    model = make_model(r=8)
    model.add_adapter("second", LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear"))
    model.set_adapter("second")
    layer = survey(model).layers[UP]
    assert [(adapter.name, adapter.active, adapter.rank, adapter.dropout) for adapter in layer.adapters] == [
        ("second", True, 4, 0.5),
        ("default", False, 8, 0.0),
    ]
    assert layer.rank == 4


def test_adapters_of_other_kinds() -> None:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    for layer in survey(get_peft_model(make_base(), config)).layers.values():
        assert layer.adapters == (LayerAdapter("default", active=True, rank=None, dtype=None, dropout=0.0),)
        assert layer.rank is None
        assert layer.cannot_fuse == "Linear is not a LoRA linear layer"
    found = survey(get_peft_model(make_base(), AdaLoraConfig(target_modules=["k_proj"], total_step=10)))
    assert found.language_model is None
    assert found.cannot_score == "AdaLoraModel has a forward of its own, which may add to the loss"


def test_adapters_around_each_other_adapt_one_layer() -> None:
    model = mixed_model()
    found = survey(model)
    assert list(found.layers) == [UP, UP.replace("layers.0", "layers.1")]
    layer = found.layers[UP]
    assert layer.module is model.get_submodule(UP).base_layer
    assert layer.base is layer.module.get_base_layer()
    assert layer.cannot_fuse == ""


def test_a_model_that_is_none_of_transformers() -> None:
    found = survey(get_peft_model(nn.Sequential(nn.Linear(8, 6)), LoraConfig(r=2, target_modules=["0"])))
    assert found.language_model is None
    assert found.cannot_score == "PeftModel is not a model of Transformers"
    assert [layer.shape for layer in found.layers.values()] == [(6, 8)]


def test_what_cannot_be_surveyed() -> None:
    with pytest.raises(CELoraError, match="no PEFT layers in LlamaForCausalLM; add an adapter first"):
        survey(make_base())
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(CELoraError, match="PROMPT_TUNING adapts no layer"):
        survey(get_peft_model(make_base(), prompts))
    inside = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1)
    with pytest.raises(CELoraError, match="ADAPTION_PROMPT adapts no layer"):
        survey(get_peft_model(make_base(), inside))
    model = make_model()
    model.merge_adapter()
    with pytest.raises(CELoraError, match=r"merged into its base \(14 layers"):
        survey(model)
