"""The models of `bfloat16.py`, each with its batches: SmolLM2, and random Llamas with the outliers of large models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.gradient import fidelity
from celora.studies.assets import demo_model

Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of the study: its base, its batches, and how many seeds and batches are used."""

    base: Callable[[int], nn.Module]
    batches: Callable[[int], list[Batch]]
    rate: float
    neighbours: int
    batches_judged: int = 5


def smollm2(seed: int) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.bfloat16)


def text(seed: int) -> list[Batch]:
    fidelity.BATCH, fidelity.TOKENS = 1, 256
    return fidelity.text_batches(seed)


@torch.no_grad()
def planted(
    seed: int, *, hidden: int, layers: int, gain: float, sink: float, massive: float = 200.0, outliers: bool = True
) -> nn.Module:
    """A random Llama with planted outliers, whose weights are `gain` times those that keep a norm.

    Six features have the same large value in every token (Dettmers et al. 2022) and small norm weights. Token 0, which
    begins every row, has one coordinate `massive` times the usual (Sun et al. 2024). Keys have it, and queries attend
    to it with a strength that grows with `sink` squared. Without `outliers`, it has none of that.
    """
    torch.manual_seed(seed)
    heads, words, inner = 4, 1024, 11 * hidden // 4
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=2, vocab_size=words, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            p.normal_(0, (gain if "_proj" in name else 1) / math.sqrt(hidden if "embed" not in name else 1))
        if "down_proj" in name:
            p.mul_(math.sqrt(hidden / inner))
    if not outliers:
        return model.to(torch.bfloat16)
    embedding, size = model.model.embed_tokens.weight, hidden // heads
    features = torch.randperm(hidden)[:6]
    embedding[:, features] += 6 * torch.randn(6).sign()
    embedding[0] *= 0.1
    embedding[0, features[0]] = massive
    common = embedding[1:, features].mean(0)  # what the queries of all other tokens have in common
    slow = torch.zeros(size)
    slow[[size // 2 - 1, size - 1]] = 1  # the coordinates that positions turn least
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.uniform_(0.8, 1.2)
            norm.weight[features] = 0.1
        attention: Any = layer.self_attn
        seeks = sink * slow[:, None] * (common / common.square().sum())[None] / 0.1
        attention.q_proj.weight[:, features] += seeks.repeat(heads, 1)
        attention.k_proj.weight[:, features[0]] += (sink * slow / (0.1 * math.sqrt(hidden))).repeat(2)
    return model.to(torch.bfloat16)


def zipf(seed: int) -> list[Batch]:
    """Rows of 256 words drawn by Zipf's law, each after token 0."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.multinomial(1 / torch.arange(2, 1025).float(), 40 * 2 * 255, replacement=True, generator=draw) + 1
    tokens = nn.functional.pad(words.view(40, 2, 255), (1, 0))
    return [{"input_ids": row, "labels": row.clone()} for row in tokens]


MODELS = {
    "SmolLM2-135M": Model(smollm2, text, rate=5e-4, neighbours=1),
    "planted": Model(partial(planted, hidden=256, layers=12, gain=1.5, sink=3), zipf, rate=1e-3, neighbours=4),
    "planted, sharp": Model(partial(planted, hidden=128, layers=16, gain=1.4, sink=32), zipf, rate=1e-3, neighbours=4),
}
