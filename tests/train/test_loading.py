"""Loading models, tokenizers and adapters, including damaged ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from celora.errors import CELoraError
from celora.train.loading import load_adapter, load_model, load_tokenizer, lora_config
from celora.train.request.arguments import make_request, parse
from tiny import save_tiny_model


@pytest.mark.parametrize(
    ("load", "file", "change", "message"),
    [
        (load_tokenizer, "tokenizer.json", None, "cannot load a tokenizer from .*"),
        (load_model, "config.json", {"hidden_size": "x"}, "cannot load a model from .*'hidden_size': TypeError: "),
        (load_model, "config.json", {"num_attention_heads": 0}, "cannot load a model from .*"),
        (load_model, "config.json", {"vocab_size": 40}, "weights in its files have other shapes than its config.json"),
    ],
)
def test_a_model_that_is_none(load, file, change, message, inputs, tmp_path):
    model = Path(shutil.copytree(inputs["model"], tmp_path / "model"))
    before = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps({} if change is None else before | change))
    request = make_request({**inputs, "model": str(model), "output": str(tmp_path / "out")})
    with pytest.raises(CELoraError, match=message) as caught:
        load(request)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", ["hello", '{"bogus": 1}'])
def test_arguments_of_a_model_that_it_does_not_take(given, inputs, tmp_path):
    with pytest.raises(CELoraError, match=r"cannot load a model|model_init_kwargs"):
        load_model(parse(["--model_init_kwargs", given], {**inputs, "output": str(tmp_path / "out")}))


@pytest.mark.parametrize(
    ("config", "message"), [({}, "'peft_type' is missing"), ([], "list indices"), ({"peft_type": "none"}, "'none'")]
)
def test_an_adapter_that_is_none(config, message, inputs, tmp_path):
    model = load_model(make_request({**inputs, "output": str(tmp_path / "out")}))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(CELoraError, match=f"cannot load the adapter in .*{message}") as caught:
        load_adapter(model, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (1, r"has weights for 4 layers, and the model has 2 of them; .*layers\.1\.\S+ is one that it lacks"),
        (2, ""),
        (
            3,
            r"has weights for 4 layers, and the model has 6 for it; .*layers\.2\.\S+ is one that it has no weights for",
        ),
    ],
)
def test_an_adapter_of_a_model_of_another_depth_is_refused(blocks, message, inputs, tmp_path):
    """PEFT would leave out weights of layers that the model lacks, and begin anew in layers that the adapter lacks."""
    model = load_model(make_request({**inputs, "output": str(tmp_path / "out")}))
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"])).save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(inputs["model"], num_hidden_layers=blocks))
    if not message:
        assert isinstance(load_adapter(other, tmp_path), PeftModel)
        return
    with pytest.raises(CELoraError, match=message):
        load_adapter(other, tmp_path)


@pytest.mark.parametrize(("dtype", "computes"), [("float16", "float16"), ("float32", "float32"), ("auto", "bfloat16")])
def test_a_4_bit_base_computes_in_the_dtype_asked_for(dtype: str, computes: str, tmp_path: Path) -> None:
    """TRL's default is float32 products for any model. Here, auto is the checkpoint's dtype."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    own = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "float32"), dtype=torch.bfloat16)
    own.save_pretrained(tmp_path / "model")
    names = {"model": str(tmp_path / "model"), "data": "rows.jsonl", "output": str(tmp_path / "out")}
    model = load_model(make_request({**names, "load_in_4bit": True, "dtype": dtype}))
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 14
    assert {layer.compute_dtype for layer in layers} == {getattr(torch, computes)}


@pytest.mark.parametrize(
    ("asked", "layers"),
    [
        (["q_proj"], 2),
        (["self_attn.q_proj"], 2),
        (["q_proj", "k_proj"], 4),
        (["all-linear"], 14),
        ([r".*layers\.0\..*_proj"], 7),
    ],
)
def test_one_name_is_taken_as_several_are(asked, layers, inputs, tmp_path):
    """PEFT takes a single text as an expression for whole names, which no plain name is."""
    request = make_request({**inputs, "output": str(tmp_path / "out"), "lora_target_modules": asked})
    adapted = get_peft_model(load_model(request), lora_config(request))
    assert sum(name.endswith(".lora_A.default") for name, _ in adapted.named_modules()) == layers
