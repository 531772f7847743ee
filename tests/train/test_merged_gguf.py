"""Merged models as GGUF: the numbers are those of PEFT's merge, everything else is the base file's."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from adapters import SETTINGS, adapted, save
from celora.errors import CELoraError
from celora.train.formats.gguf_file import field, open_gguf
from celora.train.formats.merged_gguf import write_merged
from celora.train.formats.saved_adapter import SavedAdapter
from decoders import model_of
from ggufs import parameters, read_model, write_model

Q8_0 = gguf.GGMLQuantizationType.Q8_0
FORMATS = {"f32": 1e-6, "f16": 1e-3, "q8_0": 1e-2}  # largest error, as a share of the largest number


def merge(tmp_path, model, outtype, kind=gguf.GGMLQuantizationType.F32):
    """Write what `model` merges into. Returns the new file, and the tensors that PEFT merges."""
    config = model.config
    save(model, tmp_path / "adapter")
    merged = {name: tensor.clone() for name, tensor in parameters(model.merge_and_unload()).items()}
    base = write_model(
        tmp_path / "base.gguf", model_of(config.model_type, **KEPT.get(config.model_type, {})).unload(), kind
    )
    count = write_merged(tmp_path / "merged.gguf", base, SavedAdapter(tmp_path / "adapter"), config, outtype, "a run")
    assert count == len(open_gguf(base).tensors)
    return tmp_path / "merged.gguf", merged


KEPT = {"llama": {"attention_bias": True, "mlp_bias": True}}


@pytest.mark.parametrize("outtype", FORMATS)
def test_the_numbers_are_pefts(outtype, tmp_path):
    model = adapted()
    config = model.config
    path, merged = merge(tmp_path, model, outtype)
    found = parameters(read_model(path, config))
    for name, tensor in merged.items():
        error = (found[name] - tensor).abs().max()
        assert error <= FORMATS[outtype] * tensor.abs().max(), name
    kinds = {tensor.name: tensor.tensor_type.name for tensor in open_gguf(path).tensors}
    assert kinds["blk.0.ffn_up.weight"] == kinds["token_embd.weight"] == outtype.upper()
    assert kinds["blk.0.attn_norm.weight"] == kinds["blk.0.attn_q.bias"] == "F32"
    # q8_0 needs rows of 32 numbers, and these have 48
    assert kinds["blk.0.ffn_down.weight"] == {"q8_0": "F16"}.get(outtype, outtype.upper())


@pytest.mark.parametrize("name", ["dora", "lora_bias", "bias", "head"])
def test_what_a_lora_file_cannot_hold_is_merged(name, tmp_path):
    model = adapted(**SETTINGS[name])
    config = model.config
    path, merged = merge(tmp_path, model, "f32")
    found = parameters(read_model(path, config))
    for key, tensor in merged.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6)


def test_a_bias_that_the_base_has_no_place_for_is_one_line(tmp_path):
    model = adapted(lora_bias=True)
    adapter = SavedAdapter(save(model, tmp_path / "adapter"))
    base = write_model(tmp_path / "base.gguf", model_of("llama").unload(), gguf.GGMLQuantizationType.F32)
    with pytest.raises(CELoraError, match=r"has no bias to merge it with; only PEFT can load this adapter"):
        write_merged(tmp_path / "merged.gguf", base, adapter, model.config, "f32", "a run")


def test_norms_that_are_stored_with_an_offset_are_merged(tmp_path):
    model = model_of("gemma2")
    config = model.config
    path, merged = merge(tmp_path, model, "f32")
    found = parameters(read_model(path, config))
    for key, tensor in merged.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6)


def test_the_rest_of_the_file_is_the_bases(tmp_path):
    path, _ = merge(tmp_path, model_of("qwen2"), "q8_0", Q8_0)
    base, new = open_gguf(tmp_path / "base.gguf"), open_gguf(path)
    own = {"general.name": "a run", "general.file_type": int(gguf.LlamaFileType.MOSTLY_Q8_0)}
    assert {name: field(new, name) for name in own} == own
    kept = [name for name in base.fields if not name.startswith("GGUF.")]
    assert "test.names" in kept
    assert [field(new, name) for name in kept] == [field(base, name) for name in kept]
    tensors = {tensor.name: tensor for tensor in new.tensors}
    for tensor in base.tensors:
        same = tensors[tensor.name].data.tobytes() == tensor.data.tobytes()
        assert same == (tensor.name.rpartition(".")[0].split(".")[-1] in ("token_embd", "output", "output_norm")
                        or "norm" in tensor.name or tensor.name.endswith(".bias")), tensor.name  # fmt: skip


def test_another_base_is_refused(tmp_path):
    model = adapted()
    config = model.config
    save(model, tmp_path / "adapter")
    adapter = SavedAdapter(tmp_path / "adapter")
    other = write_model(tmp_path / "qwen2.gguf", model_of("qwen2").unload())
    with pytest.raises(CELoraError, match=r"holds a model of 'qwen2', and the adapter was trained on one of 'llama'"):
        write_merged(tmp_path / "new.gguf", other, adapter, config, "f16", "a run")
    wide = model_of("llama", attention_bias=True, mlp_bias=True).unload()
    wide.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 56)
    base = write_model(tmp_path / "wide.gguf", wide)
    with pytest.raises(CELoraError, match="this is another base model"):
        write_merged(tmp_path / "new.gguf", base, adapter, config, "f16", "a run")


def test_a_tied_embedding_or_head_is_refused(tmp_path):
    for name in ("head", "embedding"):
        model = adapted(tied=True, **SETTINGS[name])
        config = model.config
        base = write_model(
            tmp_path / f"{name}.gguf", model_of("llama", tie_word_embeddings=True, **KEPT["llama"]).unload()
        )
        adapter = SavedAdapter(save(model, tmp_path / name))
        with pytest.raises(CELoraError, match=r"tie[sd] .*; give --to safetensors"):
            write_merged(tmp_path / "new.gguf", base, adapter, config, "f16", "a run")


def test_numbers_too_large_for_float16_are_named(tmp_path):
    model = adapted()
    config = model.config
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.up_proj.lora_A.default.weight.mul_(1e6)
    adapter = SavedAdapter(save(model, tmp_path / "adapter"))
    base = write_model(tmp_path / "base.gguf", model_of("llama", **KEPT["llama"]).unload())
    with pytest.raises(CELoraError, match=r"blk.1.ffn_up.weight holds numbers too large for float16; give --outtype"):
        write_merged(tmp_path / "new.gguf", base, adapter, config, "f16", "a run")


def test_a_part_of_a_model_is_refused(tmp_path):
    model = adapted()
    adapter = SavedAdapter(save(model, tmp_path / "adapter"))
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 2)
    writer.add_tensor("token_embd.weight", np.zeros((2, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CELoraError, match="is one of several parts; join them with llama-gguf-split --merge"):
        write_merged(tmp_path / "new.gguf", tmp_path / "part.gguf", adapter, model.config, "f16", "a run")


def test_a_base_with_another_alignment_is_merged(tmp_path):
    model = adapted()
    config = model.config
    save(model, tmp_path / "adapter")
    merged = {name: tensor.clone() for name, tensor in parameters(model.merge_and_unload()).items()}
    plain = model_of("llama", **KEPT["llama"]).unload()
    base = write_model(tmp_path / "base.gguf", plain, more=lambda writer: writer.add_custom_alignment(256))
    write_merged(tmp_path / "merged.gguf", base, SavedAdapter(tmp_path / "adapter"), config, "f32", "a run")
    found = parameters(read_model(tmp_path / "merged.gguf", config))
    for key, tensor in merged.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6)
