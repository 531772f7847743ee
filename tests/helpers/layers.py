"""Frozen layers of every kind that PEFT supports, as in a model loaded with that quantisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from celora.modeling.int8_linear import Int8Linear


def conv1d(linear: nn.Linear) -> nn.Module:
    layer = Conv1D(linear.out_features, linear.in_features).to(linear.weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(linear.weight.t())
    return layer.requires_grad_(False)


def bits_and_bytes_4(linear: nn.Linear, **settings: Any) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    kind = {"quant_type": "nf4", "compress_statistics": False, **settings}
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, linear.weight.dtype, **kind
    )
    layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, module=layer, **kind)
    layer.bias = linear.bias
    return layer.to("cpu").requires_grad_(False)


def bits_and_bytes_8(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
    )
    layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    layer.bias = linear.bias
    return layer.to("cpu").requires_grad_(False)


def torchao(linear: nn.Linear, bits: int) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    grouped = quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(32))
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig() if bits == 8 else grouped)
    return linear.requires_grad_(False)


def hqq(linear: nn.Linear, bits: int, axis: int = 1) -> nn.Module:
    quantize = pytest.importorskip("hqq.core.quantize", reason="needs hqq")
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=32, axis=axis)
    layer: nn.Module = quantize.HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu")
    return layer


def held_in_8_bits(linear: nn.Linear) -> nn.Module:
    return Int8Linear.of(linear).requires_grad_(False)


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "GPT-2 Conv1D": conv1d,
    "bitsandbytes 4-bit": bits_and_bytes_4,
    "bitsandbytes 4-bit nested": lambda linear: bits_and_bytes_4(linear, compress_statistics=True, quant_type="fp4"),
    "bitsandbytes 4-bit in bf16": lambda linear: bits_and_bytes_4(linear, quant_storage=torch.bfloat16),
    "bitsandbytes 8-bit": bits_and_bytes_8,
    "torchao int8": lambda linear: torchao(linear, 8),
    "torchao int4": lambda linear: torchao(linear, 4),
    "HQQ 8-bit": lambda linear: hqq(linear, 8),
    "HQQ 4-bit": lambda linear: hqq(linear, 4),
    "HQQ 2-bit": lambda linear: hqq(linear, 2, axis=0),
    "celora int8": held_in_8_bits,
}
# For whole models: one of each kind that PEFT treats differently.
MODELS = [
    "GPT-2 Conv1D",
    "bitsandbytes 4-bit nested",
    "bitsandbytes 8-bit",
    "torchao int8",
    "torchao int4",
    "HQQ 4-bit",
    "celora int8",
]


def make_layer(
    kind: str, out: int = 96, inp: int = 128, dtype: torch.dtype = torch.float32, seed: int = 0
) -> nn.Module:
    """A frozen layer of this kind. Skips the test if its package is missing."""
    torch.manual_seed(seed)
    return KINDS[kind](nn.Linear(inp, out, bias=False, dtype=dtype))


def make_base(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of two blocks whose linear layers are all of this kind: GPT-2 for Conv1D, else Llama."""
    torch.manual_seed(0)
    if kind == "GPT-2 Conv1D":
        config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=64, n_positions=32, resid_pdrop=0.0,
                            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)  # fmt: skip
        return GPT2LMHeadModel(config).to(dtype)
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=64, use_cache=False)  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(parent, name, KINDS[kind](linear))
    # Attributes that bitsandbytes sets when it loads a checkpoint. PEFT chooses its layers by them.
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = kind == "bitsandbytes 8-bit", "4-bit" in kind and "bits" in kind
    return model


def make_adapted(kind: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    """The same, with LoRA on every linear layer of the blocks. The weights are the same each time."""
    base = make_base(kind, dtype)
    torch.manual_seed(1)
    targets = ["c_attn", "c_proj", "c_fc"] if kind == "GPT-2 Conv1D" else r".*(self_attn|mlp)\.\w+_proj"
    transposed = kind == "GPT-2 Conv1D"
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, fan_in_fan_out=transposed)
    return get_peft_model(base, config)
