"""The configuration of Transformers' model from the metadata of a GGUF file. One function a peculiarity.

The sizes are checked against the file's tensors before any model is made of them. What a family has here and
llama.cpp computes otherwise is refused: a model that is read nearly right would train, and answer nearly right.

Source of the keys: llama.cpp's `conversion/` (what it writes) and `src/models/` (what it computes).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from celora.errors import CELoraError
from celora.train.formats.architectures import ARCHITECTURES
from celora.train.formats.gguf_file import GGUFHeader, read_tensor

# "mistral" is written as "llama", and is one; so the first that has a name wins.
KINDS = {row.name: kind for kind, row in reversed(ARCHITECTURES.items())}
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_MOST = 2**31 - 1
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192  # of Llama 3's rotation, in all of its versions
_ROTATION = {  # what scales a rotation further in llama.cpp, and its value that Transformers has
    "attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0,
    "yarn_log_multiplier": 0.0,
}  # fmt: skip
_LARGEST = {"gemma2": 46, "gemma3_text": 62}  # blocks of the 27B, which scales its scores by another width


class _Metadata:
    """Values of the architecture's own keys, checked."""

    def __init__(self, header: GGUFHeader) -> None:
        self.header, self.fields, self.tensors = header, header.fields, header.tensors

    def get(self, key: str) -> Any:
        return self.fields.get(f"{self.header.architecture}.{key}")

    def has(self, tensor: str) -> bool:
        return tensor in self.tensors

    def count(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.get(key)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]  # the same in every block
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST:
            raise self.wrong(key, value, "a whole number")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
            raise self.wrong(key, value, "a number above 0")
        return value

    def wrong(self, key: str, value: object, expected: str) -> CELoraError:
        what = "nothing" if value is None else repr(value)[:60]
        name = f"{self.header.architecture}.{key}"
        return CELoraError(f"{str(self.header.path)!r} says {what} under {name}; expected {expected}")

    def refused(self, what: str) -> CELoraError:
        return CELoraError(f"{str(self.header.path)!r} {what}; give --model with the model's own folder or hub name")


def gguf_config(header: GGUFHeader) -> Any:
    """The configuration of the model in a file.

    Raises:
        CELoraError: an architecture that is not read here, or metadata that is missing, contradicts the tensors, or
            asks for what Transformers' model of the family does not compute.
    """
    read, kind = _Metadata(header), KINDS.get(header.architecture)
    if header.fields.get("general.type") == "adapter":
        raise read.refused("is an adapter, not a model")
    if kind is None:
        raise read.refused(f"holds a model of {header.architecture!r}, and only {', '.join(KINDS)} are read")
    if (parts := header.fields.get("split.count") or 1) != 1:
        raise CELoraError(f"{str(header.path)!r} is one of {parts} parts; join them with llama-gguf-split --merge")
    embedding = header.tensors.get("token_embd.weight")
    hidden, heads = read.count("embedding_length"), read.count("attention.head_count")
    if embedding is None or len(embedding.shape) != 2 or embedding.shape[1] != hidden:
        shape = "none" if embedding is None else f"one of {embedding.shape}"
        raise read.refused(f"has no embedding of the width {hidden:,} that it states, but {shape}")
    blocks = read.count("block_count")
    if blocks > len(header.tensors) or not read.has(f"blk.{blocks - 1}.attn_norm.weight"):
        raise read.refused(f"says that it has {blocks:,} blocks, and has not")
    if hidden % heads and read.get("attention.key_length") is None:
        raise read.wrong("attention.head_count", heads, f"a divisor of {hidden}")
    found: dict[str, Any] = {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": read.count("attention.head_count_kv", heads),
        "intermediate_size": read.count("feed_forward_length"),
        "max_position_embeddings": read.count("context_length"),
        "rms_norm_eps": read.real("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": not read.has("output.weight"),
        "attention_bias": read.has("blk.0.attn_q.bias"),
        "mlp_bias": read.has("blk.0.ffn_up.bias"),
    }
    if kind == "qwen2":  # which has them always
        del found["attention_bias"]
    rotated = read.count("rope.dimension_count", hidden // heads)
    if kind != "phi3":
        found["head_dim"] = read.count("attention.key_length", rotated)
        if read.count("attention.value_length", found["head_dim"]) != found["head_dim"]:
            raise read.refused("has keys and values of different widths")
        if read.count("rope.dimension_count", found["head_dim"]) != found["head_dim"]:
            raise read.refused(f"rotates only {rotated} of the {found['head_dim']} numbers of a head")
    found["rope_parameters"] = _rotation(read, kind, rotated, hidden // heads)
    found |= _special(read, embedding.shape[0]) | _peculiar(read, kind, found)
    try:
        return AutoConfig.for_model(kind, **found)
    except Exception as error:  # whatever Transformers raises about a value
        raise read.refused(f"makes no configuration of {kind!r}: {error}") from error


def _rotation(read: _Metadata, kind: str, rotated: int, head_dim: int) -> dict[str, Any]:
    """`rope_parameters`."""
    key = "rope.scaling.factor" if read.get("rope.scaling.factor") is not None else "rope.scale_linear"  # the older one
    factor = read.real(key) if read.get(key) else 1.0
    scaling = read.get("rope.scaling.type") or ("none" if factor == 1 else "linear")  # all this as llama.cpp does
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": read.real("rope.freq_base", 10_000.0)}
    if kind == "phi3":
        found["partial_rotary_factor"] = rotated / head_dim
        if read.has(ROPE_TENSORS[1]):
            long, short = (_vector(read, name, rotated // 2).tolist() for name in ROPE_TENSORS[1:])
            found |= {"rope_type": "longrope", "long_factor": long, "short_factor": short}
            found["original_max_position_embeddings"] = read.count("rope.scaling.original_context_length")
        elif scaling != "none":
            raise read.refused(f"scales its rotation ({scaling}) without the tensor rope_factors_long.weight")
        return found
    for name, usual in _ROTATION.items():
        if (value := read.get(f"rope.scaling.{name}")) not in (None, usual):
            raise read.wrong(f"rope.scaling.{name}", value, f"{usual:g}")
    if read.has(ROPE_TENSORS[1]):
        raise read.refused("has rotary factors that depend on the length of a text")
    if scaling in ("linear", "yarn"):
        found |= {"rope_type": scaling, "factor": factor}
        if scaling == "yarn":
            trained_with = read.count("rope.scaling.original_context_length", read.count("context_length"))
            found["original_max_position_embeddings"] = trained_with
    elif scaling != "none":
        raise read.wrong("rope.scaling.type", scaling, "none, linear or yarn")
    if read.has(ROPE_TENSORS[0]):
        if scaling != "none":
            raise read.refused("scales its rotation in two ways")
        found |= _llama3(read, rotated, found["rope_theta"])
    if kind != "gemma3_text":
        return found
    local = {"rope_type": "default", "rope_theta": read.real("rope.freq_base_swa", 10_000.0)}
    return {"full_attention": found, "sliding_attention": local}


def _llama3(read: _Metadata, rotated: int, theta: float) -> dict[str, Any]:
    """The parameters of Llama 3's rotation. A GGUF file has only the divisors that follow from them."""
    divisors = _vector(read, ROPE_TENSORS[0], rotated // 2)
    factor = float(divisors.max())
    if bool((divisors == 1).all()):
        return {}
    waves = 2 * math.pi * theta ** (torch.arange(0, rotated, 2).double() / rotated)
    smooth = ((_ORIGINAL / waves - _LOW) / (_HIGH - _LOW)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not torch.allclose(divisors.double(), expected, rtol=1e-3):
        raise read.refused(f"has {ROPE_TENSORS[0]}, which are not Llama 3's")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": _ORIGINAL,
    }


def _vector(read: _Metadata, name: str, length: int) -> Tensor:
    tensor = read.tensors.get(name)
    if tensor is None or tensor.shape != (length,):
        raise read.refused(f"has no {name} of {length} numbers")
    return read_tensor(read.header, tensor)


def _special(read: _Metadata, words: int) -> dict[str, int | None]:
    """Tokens with a meaning; None for one that the file has not."""
    found: dict[str, int | None] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = read.fields.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None and (not isinstance(value, int) or not 0 <= value < words):
            raise read.refused(f"says {value!r} under tokenizer.ggml.{key}_token_id, and has {words:,} tokens")
        found[f"{name}_token_id"] = value
    return found


def _peculiar(read: _Metadata, kind: str, found: dict[str, Any]) -> dict[str, Any]:
    """The settings that only this family has."""
    window = read.count("attention.sliding_window", 0, least=0) or None
    blocks = found["num_hidden_layers"]
    if kind == "granite":
        return {
            "attention_multiplier": read.real("attention.scale"),
            "embedding_multiplier": read.real("embedding_scale"),
            "residual_multiplier": read.real("residual_scale"),
            "logits_scaling": read.real("logit_scale"),
        }
    if kind == "phi3":
        original = read.count("rope.scaling.original_context_length", found["max_position_embeddings"])
        return {"sliding_window": window, "original_max_position_embeddings": original}
    if kind not in _LARGEST:
        return {}
    more: dict[str, Any] = {} if window is None else {"sliding_window": window}
    width = found["hidden_size"] // found["num_attention_heads"] if blocks == _LARGEST[kind] else found["head_dim"]
    more["query_pre_attn_scalar"] = width
    if kind == "gemma2":
        more["attn_logit_softcapping"] = read.real("attn_logit_softcapping", 50.0)
        more["final_logit_softcapping"] = read.real("final_logit_softcapping", 30.0)
    if (pattern := read.get("attention.sliding_window_pattern")) is not None:
        if isinstance(pattern, int) and not isinstance(pattern, bool):
            pattern = [(block + 1) % max(1, pattern) != 0 for block in range(blocks)]
        if not isinstance(pattern, list) or len(pattern) != blocks:
            raise read.wrong(
                "attention.sliding_window_pattern", pattern, f"a number, or one for each of {blocks} blocks"
            )
        more["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    return more
