"""A saved adapter merges into each tensor as PEFT merges it into the model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import SETTINGS, adapted, save
from celora.errors import CELoraError
from celora.train.formats.saved_adapter import SavedAdapter
from decoders import model_of


@pytest.mark.parametrize("name", SETTINGS)
def test_each_tensor_is_merged_as_peft_merges_it(name, tmp_path):
    model = adapted(**SETTINGS[name])
    base = {
        key: tensor.clone()
        for key, tensor in model_of("llama", attention_bias=True, mlp_bias=True).unload().state_dict().items()
    }
    save(model, tmp_path)
    saved = SavedAdapter(tmp_path)
    merged = model.merge_and_unload().state_dict()
    changed = {key for key, tensor in merged.items() if not torch.equal(tensor, base[key])}
    assert changed == saved.touched & merged.keys()
    assert changed
    for key, tensor in base.items():
        torch.testing.assert_close(saved.merged(key, tensor), merged[key], rtol=1e-5, atol=1e-6)


def test_what_is_rounded_is_rounded_once(tmp_path):
    model = adapted()
    save(model, tmp_path)
    saved, name = SavedAdapter(tmp_path), "model.layers.0.mlp.up_proj.weight"
    weight = torch.randn(48, 32, dtype=torch.bfloat16)
    merged = saved.merged(name, weight)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, (weight.float() + saved.delta("model.layers.0.mlp.up_proj", weight)).bfloat16())
    assert saved.merged("model.norm.weight", weight) is weight


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dora", "this file cannot hold DoRA, and the adapter has it in 'model.layers.0"),
        ("bias", r"cannot hold biases of the base \(bias\)"),
        ("lora_bias", r"cannot hold a bias of lora_B \(lora_bias\)"),
        ("whole", r"cannot hold whole tensors \(modules_to_save\)"),
        (
            "embedding",
            "cannot hold LoRA on an embedding, and the adapter has it in 'model.embed_tokens'; give --merged",
        ),
    ],
)
def test_what_a_lora_file_cannot_hold_is_named(name, said, tmp_path):
    save(adapted(**SETTINGS[name]), tmp_path)
    with pytest.raises(CELoraError, match=said):
        SavedAdapter(tmp_path).only_lora("this file", "give --merged")


def test_dora_on_an_embedding_is_refused(tmp_path):
    save(adapted(use_dora=True, target_modules=["q_proj", "embed_tokens"]), tmp_path)
    with pytest.raises(CELoraError, match=r"DoRA on the embedding 'model.embed_tokens' cannot be exported; in Python"):
        SavedAdapter(tmp_path)


def test_plain_adapters_are_only_lora(tmp_path):
    for name in ("lora", "rslora", "patterns"):
        save(adapted(**SETTINGS[name]), tmp_path / name)
        SavedAdapter(tmp_path / name).only_lora("this file", "give --merged")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"trainable_token_indices": [1]}, r"trainable_token_indices in .* cannot be exported; in Python"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' has changed the base weights"),
        ({"lora_alpha": "four"}, "lora_alpha or alpha_pattern in adapter_config.json is no number"),
        ({"alpha_pattern": [1]}, "lora_alpha or alpha_pattern in adapter_config.json is no number"),
    ],
)
def test_other_kinds_of_adapters_are_named(setting, said, tmp_path):
    save(adapted(), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(CELoraError, match=said):
        SavedAdapter(tmp_path)


def test_files_that_are_not_what_they_should_be(tmp_path):
    save(adapted(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(name for name in tensors if name.endswith("q_proj.lora_B.weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, path)
    with pytest.raises(CELoraError, match="is no pair of matrices"):
        SavedAdapter(tmp_path)
    save_file(tensors | {key.replace("lora_B", "lora_E"): tensors[key].clone()}, path)
    with pytest.raises(CELoraError, match=r"q_proj.lora_E.weight' of the adapter in .* cannot be exported"):
        SavedAdapter(tmp_path)
    save_file(tensors, path)
    with pytest.raises(CELoraError, match="this is another base model"):
        SavedAdapter(tmp_path).merged("model.layers.0.mlp.up_proj.weight", torch.zeros(8, 8))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CELoraError, match="cannot read the adapter in"):
        SavedAdapter(tmp_path)
