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


# Words as a byte-level vocabulary spells them; "Ġ" is a blank.
WORDS = ["<pad>", "<eos>", "<bos>", "<turn>", "Ġ", *"abcdefghijklmnopqrstuvwxyz0123456789", "th", "the", "Ġthe"]
MERGES = ["t h", "th e", "Ġ the"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<turn>{% endfor %}"


def write_model(
    path: Path, model: Any, kind: Any = gguf.GGMLQuantizationType.F32, *, more: Any = None, words: bool = False
) -> Path:
    """Write all tensors of a model: matrices as `kind`, the rest in float32.

    `more` is called with the writer and may add to the file. With `words`, the file has a tokenizer.
    """
    config = model.config
    layout = Layout(config)
    writer = gguf.GGUFWriter(path, layout.architecture.name)
    if more is not None:
        more(writer)
    _add_peculiar(writer, config)
    if words:
        add_tokenizer(writer, config.vocab_size)
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
    rotation = config.rope_parameters
    writer.add_rope_freq_base(rotation.get("full_attention", rotation)["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_array("test.names", ["a", "b"])
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
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


def add_tokenizer(writer: Any, size: int, **given: Any) -> None:
    """Add a byte-level tokenizer with this many tokens and a chat template. `given` replaces parts of it."""
    words = [*WORDS, *(f"[unused{i}]" for i in range(size - len(WORDS)))]
    parts = {
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.token_type": [3] * 4 + [1] * (len(WORDS) - 4) + [5] * (size - len(WORDS)),
    } | {f"tokenizer.ggml.{name}": value for name, value in given.items() if isinstance(value, list)}
    numbers = {"padding_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "eot_token_id": 3}
    numbers |= {name: value for name, value in given.items() if isinstance(value, int)}
    writer.add_string("tokenizer.ggml.model", given.get("model", "gpt2"))
    writer.add_string("tokenizer.ggml.pre", given.get("pre", "qwen2"))
    writer.add_string("tokenizer.chat_template", TEMPLATE)
    for name, value in parts.items():
        writer.add_array(name, value)
    for name, value in numbers.items():
        writer.add_uint32(f"tokenizer.ggml.{name}", value)


def _add_peculiar(writer: Any, config: Any) -> None:
    """Add what llama.cpp's converter writes for this family alone."""
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if getattr(config, "sliding_window", None) is not None and config.model_type != "mistral":
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def parameters(model: Any) -> dict[str, torch.Tensor]:
    """A model's tensors by name, without a tied head."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in tied}


def read_model(path: Path, config: Any) -> Any:
    """The model in a file, as Transformers reads it. `config` is needed because Transformers guesses some sizes."""
    if config.model_type == "mistral":
        config = None  # the file calls mistral "llama"
    return unpack_model(path, config)


def unpack_model(path: Path, config: Any = None) -> Any:
    """The model in a file, in float32. Its configuration comes from the file, unless one is given."""
    unpacked = {"quantization_config": PACKED(dequantize=True)} if PACKED else {}
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=torch.float32, **unpacked
    )
