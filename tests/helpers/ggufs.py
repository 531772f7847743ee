"""Small models as GGUF files, as llama.cpp's converter would write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from celora.train.formats.architectures import Layout

PACKED = getattr(transformers, "GgufConfig", None)  # older versions always unpack


def write_model(path: Path, model: Any, kind: Any = gguf.GGMLQuantizationType.F32) -> Path:
    """All tensors of a model in float32 or, its matrices, as `kind`."""
    config = model.config
    layout = Layout(config)
    writer = gguf.GGUFWriter(path, layout.architecture.name)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_array("test.names", ["a", "b"])
    for name, tensor in parameters(model).items():
        values = layout.to_gguf(name, tensor).numpy()
        plain = values.ndim == 1 or values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]
        stored = gguf.GGMLQuantizationType.F32 if plain else kind
        writer.add_tensor(layout.gguf_name(name), gguf.quantize(np.ascontiguousarray(values), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def parameters(model: Any) -> dict[str, torch.Tensor]:
    """A model's tensors by name, a tied head left out."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in tied}


def read_model(path: Path, config: Any) -> Any:
    """The model in a file, as Transformers reads it; by itself it takes some sizes of some families for granted."""
    if config.model_type == "mistral":
        config = None  # which says "llama" in the file
    return unpack_model(path, config)


def unpack_model(path: Path, config: Any = None) -> Any:
    """The model in a file, in float32; its configuration comes from the file, too, unless given."""
    unpacked = {"quantization_config": PACKED(dequantize=True)} if PACKED else {}
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=torch.float32, **unpacked
    )
