"""`--base int8`: what is loaded, how much of it is in memory at a time, and runs that train on it."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import celora
from celora.errors import CELoraError
from celora.modeling.int8_linear import Int8Linear
from celora.train.int8_loading import load_int8_model
from celora.train.loading import load_model
from celora.train.progress import read_metrics
from celora.train.request.arguments import make_request, parse
from celora.train.run import train
from celora.weights.checkpoint import StoredTensor
from machine import refuses
from patching import patch_all
from runs import adapter, go

SETTINGS = {"revision": None, "dtype": "auto", "attention": None, "settings": {}}


def save(folder: Path, *, tied: bool = False, size: str = "50GB", dtype: str = "bfloat16") -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, tie_word_embeddings=tied, attention_bias=True, dtype=dtype,
    )  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=size)
    return folder


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize(("tied", "size"), [(False, "50GB"), (True, "20KB")])
def test_the_model_is_the_one_that_would_be_quantised_after_loading(
    tmp_path: Path, tied: bool, size: str, dtype: str
) -> None:
    folder = save(tmp_path, tied=tied, size=size)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (size == "20KB")
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    celora.quantise_base(expected)
    found = load_int8_model(str(folder), **SETTINGS | {"dtype": dtype})
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    assert sum(isinstance(module, Int8Linear) for module in found.modules()) == 14
    tokens = torch.arange(9).view(1, 9)
    assert found(tokens).logits.equal(expected(tokens).logits)  # buffers equal the model's, too
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied
    assert found.name_or_path == str(folder)
    assert "quantization_config" not in found.config.to_dict()
    layer = found.model.layers[0].mlp.up_proj
    assert layer.original().dtype == layer.dtype  # so it can be merged


@pytest.mark.parametrize("own", [None, {"eos_token_id": [2, 0], "do_sample": True, "temperature": 0.3}])
def test_how_the_model_generates_is_what_its_folder_says(tmp_path: Path, own: dict[str, object] | None) -> None:
    folder = save(tmp_path, tied=False)
    (folder / "generation_config.json").unlink()
    if own:
        (folder / "generation_config.json").write_text(json.dumps(own))
    expected = AutoModelForCausalLM.from_pretrained(folder).generation_config
    found = load_int8_model(str(folder), **SETTINGS).generation_config
    for name in ("eos_token_id", "bos_token_id", "do_sample", "temperature"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.eos_token_id == (own["eos_token_id"] if own else 2)


def test_a_weight_is_quantised_before_the_next_one_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read, quantise, events = save(tmp_path), StoredTensor.read, Int8Linear.of, []

    def reading(tensor: StoredTensor) -> torch.Tensor:
        events.append(tensor.key.replace("_proj.weight", " is read"))
        return read(tensor)

    def holding(linear: nn.Linear) -> Int8Linear:
        events.append("held")
        return quantise(linear)

    monkeypatch.setattr(StoredTensor, "read", reading)
    monkeypatch.setattr(Int8Linear, "of", holding)
    load_int8_model(str(folder), **SETTINGS)
    assert [after for event, after in itertools.pairwise(events) if event.endswith("is read")] == ["held"] * 14


def test_what_cannot_be_read_tensor_by_tensor_is_one_line(inputs, tmp_path: Path) -> None:
    def loading(folder: Path, **more: object) -> None:
        load_model(
            make_request({**inputs, "model": str(folder), "output": str(tmp_path / "o"), "base": "int8", **more})
        )

    folder = save(tmp_path / "model")
    with pytest.raises(CELoraError, match=r"device_map in model_init_kwargs says how to load"):
        loading(folder, model_init_kwargs={"device_map": "cpu"})
    other = Path(shutil.copytree(folder, tmp_path / "quantised"))
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CELoraError, match=r"quantised already; leave out --base int8"):
        loading(other)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CELoraError, match=r"holds neither model.safetensors nor"):
        loading(folder)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"base": "int4"}, "base 'int4'"),
        ({"base": "int8", "load_in_4bit": True}, "load_in_4bit=True beside base='int8'.*another way"),
        ({"base": "int8", "fsdp": "full_shard"}, "fsdp=.* beside base='int8': .*laid out for the CPU"),
    ],
)
def test_settings_that_exclude_each_other(inputs, tmp_path: Path, given: dict[str, object], message: str) -> None:
    with pytest.raises(CELoraError, match=message):
        make_request({**inputs, "output": str(tmp_path / "o"), **given})


@pytest.mark.skipif(refuses(), reason="no 8-bit products here, so preset fast is exact")
@pytest.mark.filterwarnings("ignore:celora. at step")  # estimates that draw from so few words are bad
def test_a_run_on_a_base_in_8_bits_resumes_to_the_same_bits(inputs, tmp_path: Path, monkeypatch) -> None:
    patch_all(monkeypatch, "celora.runtime.gate:_fastest", lambda own, *_: (own, {}))
    settings = {"base": "int8", "preset": "fast", "celora": None, "lr_scheduler_type": "constant"}
    evaluated = {"eval_data": inputs["data"], "eval_strategy": "steps", "eval_steps": 3}
    result, said = go(inputs, tmp_path / "whole", **settings, **evaluated)
    assert "the linear layers of its blocks in 8 bits" in said
    assert sum(isinstance(module, Int8Linear) for module in result.model.modules()) == 14
    rows = [row for row in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "eval_loss" in row]
    assert all(row["eval_base_loss"] != row["eval_loss"] for row in rows)
    assert rows[-1]["eval_base_loss"] == pytest.approx(rows[-1]["eval_loss"], rel=0.05)

    go(inputs, tmp_path / "parts", **settings, **evaluated, max_steps=3)
    request = parse(["--max_steps", "6"], {"output": str(tmp_path / "parts"), "resume": True})
    assert request.options.base == "int8"
    train(request, console=Console(file=io.StringIO()))
    whole, parts = adapter(tmp_path / "whole"), adapter(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(whole[name].equal(parts[name]) for name in whole)
