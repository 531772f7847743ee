"""mlx-lm's adapters: by mlx-lm's own equations, each layer gives what it gives in PEFT."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

from adapters import ALL, SETTINGS, adapted, save
from celora.errors import CELoraError
from celora.train.formats import mlx_lora
from celora.train.formats.mlx_lora import MODULES, mlx_tensors, write_mlx
from celora.train.formats.saved_adapter import SavedAdapter
from decoders import model_of

INSTEAD = "; --merged --to safetensors writes a whole model, which mlx-lm loads if it knows the family"


def export(model, folder):
    """Export the adapter of a model; gives mlx-lm's settings and tensors, read from the folder."""
    save(model, folder / "adapter")
    (folder / "mlx").mkdir()
    count = write_mlx(folder / "mlx", SavedAdapter(folder / "adapter"), model.config)
    tensors = load_file(folder / "mlx" / "adapters.safetensors")
    assert count == len(tensors)
    return json.loads((folder / "mlx" / "adapter_config.json").read_text()), tensors


def linear_layers(model):
    """The base's linear layers by name, as they are with the adapter."""
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, nn.Linear | BaseTunerLayer) and ".lora_" not in name and "base_layer" not in name:
            yield name, layer


def converted(settings, blocks):
    """The names of the layers that mlx-lm gives a LoRA of its own."""
    keys = settings["lora_parameters"]["keys"]
    last = range(blocks - settings["num_layers"], blocks)
    return {f"model.layers.{block}.{key}" for block in last for key in keys} | {key for key in keys if key == "lm_head"}


def as_mlx_lm_does(base, x, tensors, scale):
    """The output of a layer that mlx-lm converted."""
    a, b = tensors["lora_a"], tensors["lora_b"]
    if "m" not in tensors:
        return base(x) + scale * ((x @ a) @ b)
    adapted_weight = base.weight + (scale * b.T) @ a.T
    y = (tensors["m"] / adapted_weight.norm(dim=1)) * (x @ base.weight.T + scale * ((x @ a) @ b))
    return y if base.bias is None else y + base.bias


def check(model, settings, tensors):
    """Compare every layer with PEFT's, and find every tensor where mlx-lm looks for it, in its shape."""
    model.eval()
    rank, scale = settings["lora_parameters"]["rank"], settings["lora_parameters"]["scale"]
    expected = {"lora_a", "lora_b", "m"} if settings["fine_tune_type"] == "dora" else {"lora_a", "lora_b"}
    places, left = converted(settings, model.config.num_hidden_layers), dict(tensors)
    for name, layer in linear_layers(model):
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        x = torch.randn(3, base.in_features, generator=torch.Generator().manual_seed(0))
        own = {kind: left.pop(f"{name}.{kind}") for kind in expected if f"{name}.{kind}" in left}
        if own:
            assert name in places
            assert own.keys() == expected
            assert own["lora_a"].shape == (base.in_features, rank)
            assert own["lora_b"].shape == (rank, base.out_features)
            assert {tensor.dtype for tensor in own.values()} == {torch.float32}
            assert not torch.allclose(layer(x), base(x), atol=1e-2)
        with torch.no_grad():  # without tensors, mlx-lm's lora_b is zeros
            found = as_mlx_lm_does(base, x, own, scale) if own else base(x)
            torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)
    assert left == {}


@pytest.mark.parametrize("kind", MODULES)
def test_each_layer_of_each_family_gives_what_it_gives_in_peft(kind, tmp_path):
    model = model_of(kind)
    settings, tensors = export(model, tmp_path)
    check(model, settings, tensors)
    assert settings["lora_parameters"]["keys"] == sorted(MODULES[kind])
    assert len(tensors) == 2 * 2 * len(MODULES[kind])


@pytest.mark.parametrize("name", ["lora", "rslora", "patterns", "dora", "head"])
def test_each_kind_of_adapter_gives_what_it_gives_in_peft(name, tmp_path):
    model = adapted(**SETTINGS[name])
    settings, tensors = export(model, tmp_path)
    check(model, settings, tensors)
    assert ("lm_head.lora_a" in tensors) == (name == "head")
    assert settings["fine_tune_type"] == ("dora" if name == "dora" else "lora")


@pytest.mark.parametrize(("blocks", "last"), [([1], 1), ([0], 2)])
def test_some_blocks(blocks, last, tmp_path):
    model = adapted(layers_to_transform=blocks)
    settings, tensors = export(model, tmp_path)
    check(model, settings, tensors)
    assert settings["num_layers"] == last
    assert len(tensors) == 2 * len(ALL)


def test_the_settings_are_what_mlx_lm_asks_for(tmp_path):
    settings, tensors = export(adapted(target_modules=["q_proj", "up_proj"]), tmp_path)
    assert settings == {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 4, "scale": 4.0, "dropout": 0.0, "keys": ["mlp.up_proj", "self_attn.q_proj"]},
    }
    assert sorted(tensors)[:2] == ["model.layers.0.mlp.up_proj.lora_a", "model.layers.0.mlp.up_proj.lora_b"]


def test_an_adapter_that_adds_nothing_adds_nothing(tmp_path):
    settings, tensors = export(adapted(lora_alpha=0), tmp_path)
    assert settings["lora_parameters"]["scale"] == 1
    assert not any(tensor.any() for name, tensor in tensors.items() if name.endswith("lora_b"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bias", r"an adapter of mlx-lm cannot hold biases of the base \(bias\), and the adapter has it in 'model"),
        ("lora_bias", r"cannot hold a bias of lora_B \(lora_bias\)"),
        ("whole", r"cannot hold whole tensors \(modules_to_save\)"),
        ("embedding", "cannot hold LoRA on an embedding, and the adapter has it in 'model.embed_tokens'"),
    ],
)
def test_what_mlx_lm_cannot_hold_is_refused(name, said, tmp_path):
    model = adapted(**SETTINGS[name])
    save(model, tmp_path)
    with pytest.raises(CELoraError, match=f"{said}.*{INSTEAD}"):
        mlx_tensors(SavedAdapter(tmp_path), model.config)


def test_other_families_and_layers_are_refused(tmp_path):
    model = model_of("cohere")
    save(model, tmp_path / "cohere")
    with pytest.raises(CELoraError, match=rf"type 'cohere' cannot be exported to MLX, only llama, .*phi3{INSTEAD}"):
        mlx_tensors(SavedAdapter(tmp_path / "cohere"), model.config)
    model = adapted(tied=True, **SETTINGS["head"])
    save(model, tmp_path)
    with pytest.raises(CELoraError, match=f"no layer 'lm_head' in this model of type 'llama'{INSTEAD}"):
        mlx_tensors(SavedAdapter(tmp_path), model.config)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if "lm_head" not in name}
    save_file({name.replace("layers.1", "layers.7"): tensor for name, tensor in tensors.items()}, path)
    with pytest.raises(CELoraError, match=r"no layer 'model\.layers\.7\.[\w.]+' in this model"):
        mlx_tensors(SavedAdapter(tmp_path), model.config)


def test_a_damaged_adapter_is_refused(tmp_path):
    model = adapted(**SETTINGS["dora"])
    save(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: t for name, t in tensors.items() if "0.mlp.up_proj.lora_magnitude" not in name}, path)
    with pytest.raises(CELoraError, match="mlx-lm takes DoRA in all layers of an adapter or in none"):
        mlx_tensors(SavedAdapter(tmp_path), model.config)
    save_file({}, path)
    with pytest.raises(CELoraError, match="holds no layer of LoRA; there is nothing to write"):
        mlx_tensors(SavedAdapter(tmp_path), model.config)
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, path)
    (tmp_path / "mlx").mkdir()
    with pytest.raises(CELoraError, match=r"lora_a' holds NaN or infinity, so nothing is written"):
        write_mlx(tmp_path / "mlx", SavedAdapter(tmp_path), model.config)


def test_settings_that_read_back_otherwise_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(mlx_lora, "json", SimpleNamespace(dumps=json.dumps, loads=lambda text: {}))
    with pytest.raises(CELoraError, match=r"adapter_config.json does not read back as it was written; check the disk"):
        export(adapted(), tmp_path)
