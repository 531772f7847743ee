"""GGUF files: what Transformers unpacks is trained as any other model; what it leaves packed PEFT does not take."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import celora
from celora import CELoraConfig
from celora.errors import CELoraError
from celora.runtime.attachment import require
from celora.train.loading import check_model_folder
from small import make_batch, train

# Older versions of Transformers always unpack, and know no switch for it.
PACKED = getattr(transformers, "GgufConfig", None)
HIDDEN, INNER, BLOCKS, HEADS, WORDS = 64, 96, 2, 4, 61


def write(path: Path) -> np.ndarray:
    """A small Llama with 8-bit weights; gives what its first `up_proj` holds."""
    numbers = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(WORDS)
    kind = gguf.GGMLQuantizationType.Q8_0

    def add(name: str, *shape: int) -> np.ndarray:
        values = numbers.normal(0, 0.05, shape).astype(np.float32)
        packed = gguf.quantize(values, kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        unpacked: np.ndarray = gguf.dequantize(packed, kind)
        return unpacked

    add("token_embd", WORDS, HIDDEN)
    add("output", WORDS, HIDDEN)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    up = []
    for i in range(BLOCKS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{i}.{name}", HIDDEN, HIDDEN)
        add(f"blk.{i}.ffn_gate", INNER, HIDDEN)
        up.append(add(f"blk.{i}.ffn_up", INNER, HIDDEN))
        add(f"blk.{i}.ffn_down", HIDDEN, INNER)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return up[0]


def load(folder: Path) -> LlamaForCausalLM:
    unpacked = {"quantization_config": PACKED(dequantize=True)} if PACKED else {}
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32, **unpacked)


# peft looks for the base model's configuration on the hub when it saves, and says that it could not.
@pytest.mark.filterwarnings("ignore:Could not find a config file in")
def test_an_unpacked_file_trains_on_estimates_and_saves_an_ordinary_adapter(tmp_path: Path) -> None:
    up = write(tmp_path / "model.gguf")
    base = load(tmp_path)
    torch.testing.assert_close(base.model.layers[0].mlp.up_proj.weight.detach(), torch.from_numpy(up))
    model = get_peft_model(base, LoraConfig(target_modules="all-linear"))
    report = celora.attach(model, CELoraConfig(estimator="columns", keep_ratio=0.5, rank=4, refresh_every=3))
    assert len(report.estimated) == 7 * BLOCKS
    train(model, 7)
    assert require(model).refreshes == 3
    assert require(model).relative_errors
    model.save_pretrained(tmp_path / "adapter")
    stock = PeftModel.from_pretrained(load(tmp_path), tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = [of(**make_batch(9)).logits for of in (stock, model.eval())]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def test_packed_weights_are_refused_by_peft(tmp_path: Path) -> None:
    """The day that PEFT takes them, celora has to read them (docs/use/quantised.md)."""
    if PACKED is None:
        write(tmp_path / "model.gguf")
        assert type(load(tmp_path).model.layers[0].mlp.up_proj) is torch.nn.Linear
        return
    from transformers.integrations.gguf.utils import GgufLinear

    base = torch.nn.Sequential(GgufLinear(HIDDEN, INNER, int(gguf.GGMLQuantizationType.Q8_0)))
    with pytest.raises(ValueError, match="GgufLinear"):
        get_peft_model(base, LoraConfig(target_modules=["0"]))


def test_a_folder_with_a_file_alone_is_told_how_to_unpack_it(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf")
    with pytest.raises(
        CELoraError,
        match=r"model\.gguf.*GgufConfig\(dequantize=True\)" if PACKED else r"model\.gguf'\)\.save_pretrained",
    ):
        check_model_folder(str(tmp_path))
