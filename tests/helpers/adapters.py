"""LoRA adapters of every kind on a small Llama. All their parameters are far from zero."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from decoders import model_of

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 32, "k_proj": 5}},
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "whole": {"modules_to_save": ["lm_head", "input_layernorm"]},
    "embedding": {"target_modules": [*ALL, "embed_tokens"]},
    "head": {"target_modules": [*ALL, "lm_head"]},
}


def adapted(tied: bool = False, **settings: Any) -> Any:
    """A small Llama with such an adapter."""
    base = model_of("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=tied).unload()
    base.config._name_or_path = ""
    settings = {"target_modules": ALL, "r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM"} | settings
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        model = get_peft_model(base, LoraConfig(**settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1.5)
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save(model: Any, folder: Any) -> Any:
    """Save with PEFT, without its warnings."""
    with warnings.catch_warnings():
        # PEFT looks for the base model's configuration on the hub, and takes one-dimensional biases for damage.
        for message in ("Could not find a config file in", "Setting `save_embedding_layers`", "Adapter 'default'"):
            warnings.filterwarnings("ignore", message=message)
        model.config._name_or_path = ""
        model.save_pretrained(folder)
    return folder
