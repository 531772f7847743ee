"""llama.cpp LoRA files: llama.cpp computes from them what PEFT computes from the adapter."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import SETTINGS, adapted, save
from celora.errors import CELoraError
from celora.train.formats.gguf_file import field, open_gguf, read_header
from celora.train.formats.lora_gguf import lora_tensors, write_lora
from celora.train.formats.saved_adapter import SavedAdapter
from decoders import model_of
from ggufs import parameters, read_model, write_model

READ = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")


def as_llama_cpp_does(base, lora, target):
    """Write the weights `W + (alpha / r) b a`, with which llama.cpp multiplies, to a file of their own."""
    model, adapter = open_gguf(base), open_gguf(lora)
    alpha = field(adapter, "adapter.lora.alpha")
    pairs = {tensor.name: np.asarray(tensor.data) for tensor in adapter.tensors}
    writer = gguf.GGUFWriter(target, field(model, "general.architecture"))
    for entry in model.fields.values():
        if not entry.name.startswith(("GGUF.", "general.architecture")):
            kind = entry.types[0]
            inner = entry.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(entry.name, entry.contents(), kind, sub_type=inner)
    for tensor in model.tensors:
        values = np.array(tensor.data)
        if f"{tensor.name}.lora_a" in pairs:
            a, b = pairs.pop(f"{tensor.name}.lora_a"), pairs.pop(f"{tensor.name}.lora_b")
            values = values + (alpha / len(a)) * (b @ a)
        writer.add_tensor(tensor.name, values)
    assert not pairs
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def check(model, folder):
    save(model, folder / "adapter")
    config = model.config
    assert write_lora(folder / "lora.gguf", SavedAdapter(folder / "adapter"), config, "a run") > 0
    base = write_model(folder / "base.gguf", model.unload())
    return parameters(read_model(as_llama_cpp_does(base, folder / "lora.gguf", folder / "merged.gguf"), config))


@pytest.mark.parametrize("kind", READ)
def test_the_file_says_what_peft_says(kind, tmp_path):
    merged = parameters(model_of(kind).merge_and_unload())
    found = check(model_of(kind), tmp_path)
    for name, tensor in merged.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["rslora", "patterns", "head"])
def test_each_layer_keeps_its_own_scaling(name, tmp_path):
    merged = parameters(adapted(**SETTINGS[name]).merge_and_unload())
    found = check(adapted(**SETTINGS[name]), tmp_path)
    for key in (key for key in merged if key.endswith("proj.weight")):
        torch.testing.assert_close(found[key], merged[key], rtol=1e-5, atol=1e-6)


def test_the_metadata_is_what_llama_cpp_asks_for(tmp_path):
    model = model_of("granite")
    save(model, tmp_path)
    write_lora(tmp_path / "lora.gguf", SavedAdapter(tmp_path), model.config, "a run")
    reader = open_gguf(tmp_path / "lora.gguf")
    stated = {
        "general.architecture": "granite",
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.name": "a run",
    }
    assert {name: field(reader, name) for name in stated} == stated
    assert field(reader, "adapter.lora.alpha") == 8  # this is PEFT's default
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes["blk.1.ffn_down.weight.lora_a"] == [48, 4]
    assert shapes["blk.1.ffn_down.weight.lora_b"] == [4, 32]


def test_an_adapter_that_adds_nothing_adds_nothing(tmp_path):
    model = adapted(lora_alpha=0)
    save(model, tmp_path)
    alpha, tensors = lora_tensors(SavedAdapter(tmp_path), model.config)
    assert alpha == 1
    assert not any(tensor.any() for name, tensor in tensors.items() if name.endswith("lora_b"))


def test_a_tied_head_and_a_layer_without_a_name_are_refused(tmp_path):
    model = adapted(tied=True, **SETTINGS["head"])
    save(model, tmp_path)
    with pytest.raises(CELoraError, match=r"LoRA on lm_head where the model ties it to its embedding; give --merged"):
        lora_tensors(SavedAdapter(tmp_path), model.config)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {name.replace("q_proj", "x_proj"): t for name, t in load_file(path).items() if "lm_head" not in name}
    save_file(tensors, path)
    with pytest.raises(CELoraError, match=r"no tensor for 'model.layers.0.self_attn.x_proj' in models of 'llama'"):
        lora_tensors(SavedAdapter(tmp_path), model.config)
    save_file({name.replace("x_proj", "q_proj"): tensor * float("nan") for name, tensor in tensors.items()}, path)
    with pytest.raises(CELoraError, match="holds NaN or infinity"):
        lora_tensors(SavedAdapter(tmp_path), model.config)
    save_file({"base_model.model.lm_head.bias": torch.zeros(4)}, path)
    with pytest.raises(CELoraError, match="cannot hold biases of the base"):
        lora_tensors(SavedAdapter(tmp_path), model.config)


def test_a_base_that_it_does_not_fit_is_refused(tmp_path):
    model = adapted()
    save(model, tmp_path / "adapter")
    adapter, file = SavedAdapter(tmp_path / "adapter"), tmp_path / "lora.gguf"
    base = read_header(write_model(tmp_path / "base.gguf", model.unload()))
    assert write_lora(file, adapter, model.config, "a run", base) > 0
    name, tensor = next((name, tensor) for name, tensor in base.tensors.items() if name.endswith("ffn_down.weight"))
    wider = replace(base, tensors={**base.tensors, name: replace(tensor, shape=(64, 64))})
    for other, message in (
        (wider, rf"is another model: {name} is 64 x 64, and the adapter was trained on one of 32 x 48; give its own"),
        (read_header(file), r"is another model: \S+ is not there"),
        (replace(base, fields={**base.fields, "general.architecture": "qwen2"}), "holds a model of 'qwen2'"),
    ):
        with pytest.raises(CELoraError, match=message):
            write_lora(tmp_path / "other.gguf", adapter, model.config, "a run", other)
    part = replace(base, tensors={}, fields={**base.fields, "split.count": 2})
    assert write_lora(tmp_path / "other.gguf", adapter, model.config, "a run", part) > 0
