"""A cell of the bench: one model on one kind of data. Makes its model and its batches."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from celora.errors import CELoraError, unknown
from celora.files import json_lines, write_text
from celora.machine.device import default_device
from celora.studies.assets import demo_model
from celora.studies.sentiment import splits, to_rows

Batch = dict[str, Tensor]
DATA = {
    "full": "4 x 256 tokens, all labelled",
    "instruct": "4 sequences of 64 to 256 tokens, the last 30 % of each labelled",
    "demo": "8 sentences of the demo's reviews, their sentiment labelled",
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = ("bfloat16", "float32")
SMOLLM2 = "smollm2"


@dataclass(frozen=True)
class Llama:
    """The shape of a Llama 3; `tied`: whether the head is the embedding."""

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    tied: bool = True
    words: int = 128_256

    def config(self) -> LlamaConfig:
        """The configuration of a model of this shape."""
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=8,
            vocab_size=self.words,
            tie_word_embeddings=self.tied,
        )


LLAMAS = {
    "llama-1b": Llama(2048, 8192, blocks=16, heads=32),
    "llama-3b": Llama(3072, 8192, blocks=28, heads=24),
    "llama-8b": Llama(4096, 14_336, blocks=32, heads=32, tied=False),
}
_NAME = re.compile(r"h(\d+)-v(\d+)k")
_LAYERS = {2048: 4}  # by hidden size; others have 8. A step should take seconds
_BATCHES = 8  # of different lengths, so that padding is typical


def _heads(hidden: int) -> int:
    return max(1, hidden // 64)


@dataclass(frozen=True)
class Cell:
    """One model on one kind of data.

    Attributes:
        model: `smollm2`, or a Llama of random weights: a key of `LLAMAS`, or `h1024-v32k` for one with hidden size
            1024 and 32,000 words.
        data: a key of `DATA`.
        dtype: dtype of the base. Adapters are float32, PEFT's default.
        tokens: tokens in a `full` batch.
    """

    model: str
    data: str
    dtype: str = "bfloat16"
    tokens: int = 1024

    def __post_init__(self) -> None:
        named = _NAME.fullmatch(self.model)
        if self.model not in (SMOLLM2, *LLAMAS) and not named:
            known = ", ".join((SMOLLM2, *LLAMAS))
            raise CELoraError(f"model {self.model!r}; expected {known} or a shape like h1024-v32k.")
        if named and (0 in map(int, named.groups()) or int(named[1]) % (2 * _heads(int(named[1])))):
            raise CELoraError(
                f"model {self.model!r}; expected words, and a hidden size that heads of about 64 can share."
            )
        if self.data not in DATA:
            raise unknown("data", self.data, DATA)
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.data == "demo" and self.model != SMOLLM2:
            raise CELoraError(f"data 'demo' is text; it needs the model {SMOLLM2}, not {self.model!r}.")


QUICK = (Cell(SMOLLM2, "demo"),)
USUAL = (Cell(SMOLLM2, "demo"), Cell(SMOLLM2, "full"), Cell("h1024-v32k", "full"), Cell("h1024-v32k", "instruct"))


def parse_cell(text: str) -> Cell:
    """A cell from `MODEL:DATA` or `MODEL:DATA:DTYPE`."""
    parts = text.split(":")
    if not 2 <= len(parts) <= 3:
        raise CELoraError(f"cell {text!r}; expected MODEL:DATA or MODEL:DATA:DTYPE, like h1024-v32k:instruct.")
    return Cell(parts[0], parts[1], parts[2] if len(parts) == 3 else DTYPES[0])


def make_model(cell: Cell, *, upper: bool = False) -> PeftModel:
    """The cell's model with LoRA, r = 16 on all linear layers, on the device that Trainer would choose.

    `upper`: LoRA on the upper half of the layers only.
    """
    torch.manual_seed(0)
    dtype = getattr(torch, cell.dtype)
    if cell.model == SMOLLM2:
        base = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=dtype, trust_remote_code=False)
    else:
        with default_device():  # a GPU draws the numbers of a large model in a second
            base = AutoModelForCausalLM.from_config(shape_config(cell), dtype=dtype, trust_remote_code=False)
    half = base.config.num_hidden_layers // 2
    lora = LoraConfig(
        r=16,
        target_modules=LINEAR,
        layers_to_transform=list(range(half, 2 * half)) if upper else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, lora).to(default_device())


def make_batches(cell: Cell) -> list[Batch]:
    """The batches of a cell, the same for every arm."""
    if cell.data == "demo":
        return _demo_batches()
    generator = torch.Generator().manual_seed(0)
    words = 49152 if cell.model == SMOLLM2 else shape_config(cell).vocab_size
    width = min(256, cell.tokens)
    batches = []
    for _ in range(2 if cell.data == "full" else _BATCHES):
        tokens = torch.randint(0, words, (max(1, cell.tokens // width), width), generator=generator)
        mask = labelled = torch.ones_like(tokens, dtype=torch.bool)
        if cell.data == "instruct":
            lengths = torch.randint(width // 4, width + 1, (len(tokens), 1), generator=generator)
            place = torch.arange(width)[None]
            mask = place < lengths
            labelled = mask & (place >= (0.7 * lengths).long())
            longest = int(lengths.max())  # a collator pads to the longest row
            tokens, mask, labelled = tokens[:, :longest], mask[:, :longest], labelled[:, :longest]
        labels = torch.where(labelled, tokens, -100)
        batches.append({"input_ids": tokens, "attention_mask": mask.long(), "labels": labels})
    return batches


def _demo_batches() -> list[Batch]:
    """Batches of the demo's rows, made by the code of `celora train`."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        chosen = splits(train=8 * _BATCHES, seed=0).train
        write_text(rows, json_lines(to_rows(chosen)))
        given = {"model": str(demo_model()), "data": str(rows), "output": scratch, "preset": "off"}
        return training_batches(given | {"per_device_train_batch_size": 8}, _BATCHES)


def training_batches(settings: Mapping[str, object], count: int) -> list[Batch]:
    """`count` of the batches that `celora train` sees in an epoch with these settings, evenly spaced."""
    from celora.train.prepare import prepared  # other cells need no package of the application
    from celora.train.request.arguments import make_request

    with prepared(make_request(dict(settings)), None, None) as (trainer, _):
        batches = [dict(batch) for batch in trainer.get_train_dataloader()]
    stride = max(1, len(batches) // count)
    return batches[stride // 2 :: stride][:count]


def shape_config(cell: Cell) -> LlamaConfig:
    """The Llama of random weights that a cell names."""
    if cell.model in LLAMAS:
        return LLAMAS[cell.model].config()
    named = _NAME.fullmatch(cell.model)
    assert named is not None
    hidden, words = int(named[1]), 1000 * int(named[2])
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=_LAYERS.get(hidden, 8),
        num_attention_heads=_heads(hidden),
        num_key_value_heads=_heads(hidden),
        vocab_size=words,
    )


def told(models: Iterable[str]) -> str:
    """Sentences that describe the models of cells."""
    sentences = []
    for name in dict.fromkeys(models):
        if name == SMOLLM2:
            sentences.append(f"{name}: SmolLM2-135M-Instruct, its weights unpacked from 4 bits (Q4_1).")
        else:
            config = shape_config(Cell(name, "full"))
            sentences.append(
                f"{name}: a Llama of random weights, hidden size {config.hidden_size:,}, "
                f"{config.num_hidden_layers} blocks, {config.vocab_size:,} words."
            )
    return " ".join(sentences)
