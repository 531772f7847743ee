"""Small models of many families, with adapters. Random weights are large enough to make a mistake visible."""

from __future__ import annotations

import copy
import functools
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from versions import before

VOCAB, IMAGE = 50, 49
_WORDS = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_DECODER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, **_WORDS,
}  # fmt: skip
_ENCODER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, **_WORDS,
}  # fmt: skip
_VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4, "projection_dim": 16,
}  # fmt: skip
_SLIDING = {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {
    "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip

# The configuration of each family. A failing case is made simpler towards the first one.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _DECODER,
    "qwen2": _DECODER,
    "qwen3": {**_DECODER, "head_dim": 8},
    "mistral": {**_DECODER, "sliding_window": None},
    "phi3": _DECODER,
    "granite": {**_DECODER, "logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "cohere": {**_DECODER, "logit_scale": 0.5},
    "gemma": {**_DECODER, "head_dim": 8},
    "gemma2": {**_DECODER, **_SLIDING, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_DECODER, **_SLIDING, "query_pre_attn_scalar": 8},
    "olmo2": _DECODER,
    "smollm3": {**_DECODER, "no_rope_layers": [1, 0]},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0, **_WORDS},
    "opt": {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32, **_WORDS,
    },
    "mixtral": {**_DECODER, "num_local_experts": 3},
    "qwen2_moe": {**_DECODER, **_EXPERTS},
    "recurrent_gemma": {
        **_DECODER, "lru_width": 32, "attention_window_size": 6, "block_types": ["recurrent", "attention"],
    },
    "bert": {**_ENCODER, "attention_probs_dropout_prob": 0.0, "num_labels": 3},
    "t5": {
        "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0,
        "dropout_rate": 0.0, "feed_forward_proj": "gated-gelu", **_WORDS,
    },
    "llava": {
        "vision_config": {"model_type": "clip_vision_model", **_VISION},
        "text_config": {"model_type": "llama", **_DECODER}, "image_token_index": IMAGE, "image_seq_length": 4,
        "vision_feature_layer": -1,
    },
    "gemma3": {
        "vision_config": {"model_type": "siglip_vision_model", **_VISION},
        "text_config": {"model_type": "gemma3_text", **_DECODER, **_SLIDING, "query_pre_attn_scalar": 8},
        "image_token_index": IMAGE, "mm_tokens_per_image": 4,
    },
}  # fmt: skip
OTHER_HEADS = {
    "bert": AutoModelForSequenceClassification,
    "t5": AutoModelForSeq2SeqLM,
    "llava": AutoModelForImageTextToText,
    "gemma3": AutoModelForImageTextToText,
}
NO_SDPA = ("gemma2",)
# Since Transformers 5, experts have routers that tests can listen to, and no products in float64.
EXPERTS = () if before("transformers", "5") else ("mixtral", "qwen2_moe")
VISUAL = ("llava", "gemma3")

# Names of adapted layers. In a family without these names, "all-linear".
TARGETS = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "query", "value", "c_attn", "q", "v"],
    "mlp": ["gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "c_fc", "wi_0", "wo"],
    "one": ["v_proj", "qkv_proj", "query", "c_attn", "v"],
    "last": ["down_proj", "fc2", "c_proj", "wo", "output.dense"],
    "head": ["q_proj", "qkv_proj", "query", "c_attn", "q", "lm_head", "classifier"],
}  # fmt: skip


Model = TypeVar("Model", bound=nn.Module)


@functools.lru_cache(maxsize=64)
def _base(family: str, changes: tuple[tuple[str, Any], ...], attention: str, seed: int) -> PreTrainedModel:
    settings = copy.deepcopy(FAMILIES[family])
    for name, value in changes:
        inner = "text_config" if family in VISUAL and name != "tie_word_embeddings" else None
        (settings[inner] if inner else settings)[name] = list(value) if isinstance(value, tuple) else value
    torch.manual_seed(seed)
    kind = OTHER_HEADS.get(family, AutoModelForCausalLM)
    model: PreTrainedModel = kind.from_config(
        AutoConfig.for_model(family, **settings), attn_implementation=attention, dtype=torch.float32
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2:  # norms, biases
                p.add_(torch.randn_like(p) * 0.2)
            elif family != "t5":
                p.copy_(torch.randn_like(p) * (0.4 if "embed" in name or "wte" in name else 1.0 / p.shape[-1] ** 0.5))
    return model.train()


def duplicate(model: Model) -> Model:
    """A deep copy. Most of a model are hooks that nobody has registered: they are not copied, but made anew."""
    parts = (part for module in model.modules() for part in vars(module).values() if isinstance(part, dict | set))
    return copy.deepcopy(model, {id(part): type(part)() for part in parts if not part})


def make_base(family: str, changes: tuple[tuple[str, Any], ...], attention: str, seed: int) -> PreTrainedModel:
    """A copy of the family's model, with these changes to its configuration."""
    return duplicate(_base(family, changes, attention, seed))


def adapt(base: PreTrainedModel, family: str, lora: dict[str, Any], seed: int) -> PeftModel:
    """The model with an adapter.

    `lora` holds fields of LoraConfig, and `targets`, `kept_dtype`, `second`, `adapter_dtype`.
    """
    fields = dict(lora)
    targets, kept = fields.pop("targets", "all-linear"), fields.pop("kept_dtype", False)
    second, dtype = fields.pop("second", ""), fields.pop("adapter_dtype", None)
    modules: Any = _existing(base, TARGETS[targets]) if targets in TARGETS else targets
    fields = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **fields}
    if family == "gpt2":
        fields["fan_in_fan_out"] = True
    if family in VISUAL and modules == "all-linear":
        modules = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    torch.manual_seed(seed + 1)
    model = get_peft_model(base, LoraConfig(target_modules=modules, **fields), autocast_adapter_dtype=not kept)
    if second:
        other = LoraConfig(r=3, target_modules=modules, init_lora_weights=False, lora_alpha=5)
        model.add_adapter("second", other, autocast_adapter_dtype=not kept)
        model.base_model.set_adapter({"idle": "default", "chosen": "second", "both": ["default", "second"]}[second])
    for name, p in model.named_parameters() if dtype is not None else ():
        if "lora_" in name:
            p.data = p.data.to(getattr(torch, dtype))
    return model.train()


def _existing(base: nn.Module, names: list[str]) -> list[str]:
    """The names that some layer of this model has."""
    there = [name for name, _ in base.named_modules()]
    return [name for name in names if any(path == name or path.endswith(f".{name}") for path in there)]


# --- parts of a model, in order ---------------------------------------------------------------------------------------


def causal_of(model: nn.Module) -> PreTrainedModel:
    """The part of the model that has the head."""
    return next(m for m in model.modules() if isinstance(m, PreTrainedModel))


def tuners_of(model: nn.Module) -> list[BaseTunerLayer]:
    """All adapted layers."""
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer) and hasattr(m, "lora_A")]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """All decoder (or encoder) blocks."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def named(model: nn.Module, *endings: str) -> list[nn.Module]:
    """All modules whose class name ends like this."""
    return [m for m in model.modules() if type(m).__name__.endswith(endings)]
