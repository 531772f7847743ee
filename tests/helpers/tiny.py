"""A Llama of two layers with a tokenizer of its own, and rows to train it on: real runs in seconds, offline."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(40)]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def save_tiny_model(folder: Path, *, seed: int = 0, hidden: int = 32) -> Path:
    """A random model (2 layers, 48 words) and its word-level tokenizer with a chat template."""
    vocabulary = ["<pad>", "<eos>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=48, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_rows(path: Path, count: int = 24) -> Path:
    """Conversations of different lengths, so that batches are padded."""
    rows = (
        {
            "messages": [
                {"role": "user", "content": " ".join(WORDS[(i * 7 + j) % 40] for j in range(2 + i % 5))},
                {"role": "assistant", "content": " ".join(WORDS[(i * 3 + j) % 40] for j in range(3 + i % 3))},
            ]
        }
        for i in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
