"""A small decoder of each family, with LoRA on all linear layers, and the gradient of its adapter."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from celora.modeling.families import FAMILIES
from small import made_once

EXTRA: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 4.0},
    "gemma3_text": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 64},
    "cohere2": {"logit_scale": 0.5, "sliding_window": 64},
    "qwen3": {"head_dim": 8},
    "phi3": {"pad_token_id": 0},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "olmo3": {"sliding_window": 64},
    "starcoder2": {"sliding_window": 64},
    "ministral3": {"head_dim": 8},
    "seed_oss": {"head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "exaone4": {"sliding_window": 64},
}
EXPERTS = ("mixtral", "qwen3_moe")  # these are no linear layers, and compute in no float64


PACKED = sorted(name for name in FAMILIES if FAMILIES[name].packs_with and name in CONFIG_MAPPING)


@made_once
def model_of(kind: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        **{
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
            "max_position_embeddings": 64, **EXTRA.get(kind, {}), **more,
        },
    )  # fmt: skip
    attention = "sdpa" if kind in FAMILIES and FAMILIES[kind].packs_with else "eager"
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    targets: Any = ["q_proj", "k_proj", "v_proj", "o_proj"] if kind in EXPERTS else "all-linear"
    return get_peft_model(base, LoraConfig(target_modules=targets, r=4, init_lora_weights=False)).train()


def logit_gradients(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The gradients of the mean square of all logits."""
    model.zero_grad()
    model(**batch).logits.float().square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
