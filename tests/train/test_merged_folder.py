"""Merged models for Transformers answer like PEFT's model, whatever was trained."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters import SETTINGS, adapted, save
from celora.errors import CELoraError
from celora.train.formats import merged_folder, shards
from celora.train.formats.merged_folder import base_folder, write_folder
from celora.train.formats.saved_adapter import SavedAdapter
from decoders import model_of
from tiny import save_tiny_model

TOKENS = torch.arange(3, 23)[None]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("tiny")))


def base_of(folder, *, tied=False, dtype=torch.float32):
    model = model_of("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=tied).unload()
    model.to(dtype).save_pretrained(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_merged_model_answers_as_the_adapted_one(name, tied, tokenizer, tmp_path):
    model = adapted(tied=tied, **SETTINGS[name])
    expected = logits(model)
    adapter = SavedAdapter(save(model, tmp_path / "adapter"))
    base = base_of(tmp_path / "base", tied=tied)
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    (tmp_path / "new").mkdir()
    count = write_folder(tmp_path / "new", base, adapter, tokenizer)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert count == len(load_file(tmp_path / "new" / "model.safetensors"))
    torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-5)
    assert (expected - plain).abs().max() > 0.01
    assert AutoTokenizer.from_pretrained(tmp_path / "new").get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_checkpoint_without_the_models_prefix(name, tokenizer, tmp_path):
    """As that of a bare model, which many families have. A head that was the embedding cannot be made of it."""
    model = adapted(tied=True, **SETTINGS[name])
    expected = logits(model)
    adapter = SavedAdapter(save(model, tmp_path / "adapter"))
    base = base_of(tmp_path / "base", tied=True)
    tensors = load_file(base / "model.safetensors")
    save_file({k.removeprefix("model."): v for k, v in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    (tmp_path / "new").mkdir()
    if not {"model.embed_tokens.weight", "lm_head.weight"}.isdisjoint(adapter.touched):
        with pytest.raises(
            CELoraError, match=r"has no 'model.embed_tokens.weight', of which the adapter makes the head"
        ):
            write_folder(tmp_path / "new", base, adapter, tokenizer)
        return
    write_folder(tmp_path / "new", base, adapter, tokenizer)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "new")), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_tied_is_what_the_models_class_says(tokenizer, tmp_path):
    """Gemma's embeddings are tied unless its config.json says otherwise, and Transformers leaves defaults out."""
    plain = model_of("gemma").unload()
    model = get_peft_model(plain, LoraConfig(target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)).eval()
    expected = logits(model)
    adapter = SavedAdapter(save(model, tmp_path / "adapter"))
    base = tmp_path / "base"
    model.unload().save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (base / "config.json").write_text(json.dumps(config))
    (tmp_path / "new").mkdir()
    write_folder(tmp_path / "new", base, adapter, tokenizer)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-5)
    assert "lm_head.weight" in load_file(tmp_path / "new" / "model.safetensors")


@pytest.mark.parametrize(
    ("own", "generation", "ends", "file"),
    [
        (0, None, 5, [5, 0]),
        (0, {"eos_token_id": 0, "temperature": 0.5, "do_sample": True}, 5, [5, 0]),
        ([0, 7], {"eos_token_id": [0, 7]}, [5, 0, 7], [5, 0, 7]),
        (None, None, 5, [5]),
        (5, {"temperature": 0.5, "do_sample": True}, 5, [5]),
        ([0, 5], {"eos_token_id": [0, 5]}, [0, 5], [0, 5]),
        (5, None, 5, 5),  # without a file of its own, the model's configuration says it
    ],
)
def test_the_merged_model_ends_where_training_ended(own, generation, ends, file, tokenizer, tmp_path):
    """`--eos_token` may have made it another token than the base's. Other settings stay."""
    model = adapted(**SETTINGS["lora"])
    adapter = SavedAdapter(save(model, tmp_path / "adapter"))
    base = base_of(tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"eos_token_id": own, "bos_token_id": 3}
    config |= {"repetition_penalty": 1.5}  # which counts without a file of its own
    (base / "config.json").write_text(json.dumps(config))
    (base / "generation_config.json").unlink()
    if generation:
        (base / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "new").mkdir()
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(5)
    write_folder(tmp_path / "new", base, adapter, tokenizer)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert found.config.eos_token_id == ends
    assert found.generation_config.eos_token_id == file
    assert found.generation_config.bos_token_id == (None if generation else 3)
    assert found.generation_config.temperature == (generation or {}).get("temperature")
    assert found.generation_config.repetition_penalty == (None if generation else 1.5)
    assert (tmp_path / "new" / "generation_config.json").exists() == (generation is not None or own != 5)


@pytest.mark.parametrize(
    ("config", "end", "then", "file"),
    [
        ({"eos_token_id": [1, 6], "text_config": {"eos_token_id": 1}}, 7, ([7, 1, 6], 7), [7, 1, 6]),
        ({"eos_token_id": [1, 6], "text_config": {}}, 1, ([1, 6], None), None),
        ({"text_config": {"eos_token_id": 1}}, 7, (None, 7), [7]),
        ({"eos_token_id": 1, "text_config": None}, 7, (7, None), [7, 1]),
        ({}, 7, (7, None), [7]),
        ({"eos_token_id": 1}, None, (1, None), None),
    ],
)
def test_where_a_configuration_of_several_parts_ends(config, end, then, file):
    made = merged_folder._ending(config, None, end)
    assert (config.get("eos_token_id"), (config.get("text_config") or {}).get("eos_token_id")) == then
    assert (made and made["eos_token_id"]) == file


def test_several_files_go_in_and_come_out(tokenizer, tmp_path, monkeypatch):
    model = adapted()
    expected = logits(model)
    adapter = SavedAdapter(save(model, tmp_path / "adapter"))
    plain = model_of("llama", attention_bias=True, mlp_bias=True).unload()
    plain.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    monkeypatch.setattr(merged_folder, "_MOST_BYTES", 10_000)
    (tmp_path / "new").mkdir()
    write_folder(tmp_path / "new", tmp_path / "base", adapter, tokenizer)
    files = sorted(path.name for path in (tmp_path / "new").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "new")), expected)


def test_the_dtype_is_the_bases(tokenizer, tmp_path):
    adapter = SavedAdapter(save(adapted(), tmp_path / "adapter"))
    base = base_of(tmp_path / "base", dtype=torch.bfloat16)
    (tmp_path / "new").mkdir()
    write_folder(tmp_path / "new", base, adapter, tokenizer)
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert (tmp_path / "new" / "generation_config.json").is_file()


def test_a_file_beside_the_weights_is_not_the_models(tokenizer, tmp_path):
    adapter = SavedAdapter(save(adapted(), tmp_path / "adapter"))
    base = base_of(tmp_path / "base")
    names = load_file(base / "model.safetensors").keys()
    save_file({"layers.0.weight": torch.ones(2)}, base / "consolidated.safetensors")
    (tmp_path / "new").mkdir()
    write_folder(tmp_path / "new", base, adapter, tokenizer)
    assert load_file(tmp_path / "new" / "model.safetensors").keys() == names


def test_what_cannot_be_merged_is_one_line(tokenizer, tmp_path):
    model = adapted()
    adapter = SavedAdapter(save(model, tmp_path / "adapter"))
    base = base_of(tmp_path / "base")
    new = tmp_path / "new"
    new.mkdir()
    path = base / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up" not in name}, path)
    with pytest.raises(CELoraError, match=r"'model.layers.1.mlp.up_proj.weight', which the adapter changes, is not in"):
        write_folder(new, base, adapter, tokenizer)
    without = {name: tensor for name, tensor in tensors.items() if "up_proj.bias" not in name}
    save_file(without, path)
    lone = SavedAdapter(save(adapted(lora_bias=True), tmp_path / "lora_bias"))
    with pytest.raises(
        CELoraError, match=r"'model.layers.0.mlp.up_proj.bias' \(lora_bias\), and that layer of the base"
    ):
        write_folder(new, base, lone, tokenizer)
    save_file({name: tensor * float("inf") for name, tensor in tensors.items()}, path)
    with pytest.raises(CELoraError, match="holds NaN or infinity, so nothing is written"):
        write_folder(new, base, adapter, tokenizer)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CELoraError, match=r"cannot read .*model.safetensors"):
        write_folder(new, base, adapter, tokenizer)
    (base / "generation_config.json").write_text("[]")
    with pytest.raises(CELoraError, match=r"generation_config.json' is no JSON object; fetch the base model again"):
        write_folder(new, base, adapter, tokenizer)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(CELoraError, match="is quantised, and its weights cannot be merged with; give --model"):
        write_folder(new, base, adapter, tokenizer)


def test_a_file_that_reads_back_otherwise_is_no_export(tokenizer, tmp_path, monkeypatch):
    adapter = SavedAdapter(save(adapted(), tmp_path / "adapter"))
    base = base_of(tmp_path / "base")
    (tmp_path / "new").mkdir()
    plain = shards.save_file

    def damaging(tensors, path, **more):
        plain({name: tensor + 1 for name, tensor in tensors.items()}, path, **more)

    monkeypatch.setattr(shards, "save_file", damaging)
    with pytest.raises(CELoraError, match="does not read back as it was written; check the disk"):
        write_folder(tmp_path / "new", base, adapter, tokenizer)


@pytest.mark.parametrize(
    ("weights", "index", "left_out"),
    [
        (["model.safetensors"], None, "consolidated.safetensors"),
        (["1.safetensors", "2.safetensors"], {"a": "1.safetensors", "b": "2.safetensors"}, "consolidated.safetensors"),
        (["model.fp16.safetensors"], None, "README.md"),
    ],
)
def test_only_what_is_loaded_is_fetched(weights, index, left_out, tmp_path, monkeypatch):
    there = dict.fromkeys((*weights, left_out, "config.json"), b"x")
    if index is not None:
        there["model.safetensors.index.json"] = json.dumps({"weight_map": index}).encode()

    def download(model, *, revision, allow_patterns):
        assert (model, revision) == ("nobody/nothing", "v1")
        for name in filter_repo_objects(there, allow_patterns=allow_patterns):
            (tmp_path / name).write_bytes(there[name])
        return str(tmp_path)

    monkeypatch.setattr(merged_folder, "snapshot_download", download)
    assert base_folder("nobody/nothing", "v1") == tmp_path
    assert {path.name for path in tmp_path.iterdir()} == there.keys() - {left_out}


def test_a_base_is_a_folder_or_a_name(tmp_path, monkeypatch):
    assert base_folder(str(tmp_path), "main") == tmp_path
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CELoraError, match="cannot load a model from 'nobody/nothing'"):
        base_folder("nobody/nothing", "main")
