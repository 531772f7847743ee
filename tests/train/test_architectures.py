"""Names and order of llama.cpp's tensors. Transformers reads the file, and finds the model that was written."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config

from celora.errors import CELoraError
from celora.train.formats.architectures import ARCHITECTURES, Layout
from decoders import model_of
from ggufs import parameters, read_model, write_model

READ = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")


def base_of(kind):
    return model_of(kind).unload()


@pytest.mark.parametrize("kind", READ)
def test_transformers_reads_what_is_written(kind, tmp_path):
    model = base_of(kind)
    read = parameters(read_model(write_model(tmp_path / "model.gguf", model), model.config))
    written = parameters(model)
    assert read.keys() >= written.keys()
    for name, tensor in written.items():
        # A norm is stored as 1 + w. That loses the digits of w that float32 cannot hold beside the 1.
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=1e-7 if name.endswith("norm.weight") else 0)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_parameter_has_one_name_and_comes_back(kind):
    model = base_of(kind)
    layout, names = Layout(model.config), []
    for name, tensor in parameters(model).items():
        there = layout.gguf_name(name)
        assert there is not None, name
        assert there.rpartition(".")[2] == name.rpartition(".")[2]
        names.append(there)
        torch.testing.assert_close(layout.from_gguf(name, layout.to_gguf(name, tensor)), tensor, rtol=0, atol=1e-7)
    assert len(set(names)) == len(names)
    assert layout.gguf_name("model.layers.0.self_attn.nothing.weight") is None


def test_only_queries_and_keys_of_some_families_change_their_order():
    layout = Layout(base_of("llama").config)
    order = layout.row_order("model.layers.0.self_attn.k_proj.weight", 16)  # 2 heads of 8
    assert order.tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert layout.row_order("model.layers.0.self_attn.v_proj.weight", 16) is None
    assert layout.row_order("lm_head.weight", 16) is None
    assert Layout(base_of("qwen2").config).row_order("model.layers.0.self_attn.k_proj.weight", 16) is None


def test_another_family_is_named_with_what_works():
    with pytest.raises(CELoraError, match=r"models of type 'gpt2' cannot be written as GGUF here.*--merged --to safe"):
        Layout(GPT2Config())
