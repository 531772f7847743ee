"""Texts that every Python installation has, cut into batches."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics

import torch
from transformers import AutoTokenizer

from celora.studies.assets import demo_model

TOKENS = 128


def language_reference() -> str:
    """The Python language reference, which every installation has: 108,000 tokens of technical English."""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def standard_library() -> str:
    """The source of the standard library's own modules, without its packages: above a million tokens of code."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return "\n\n".join(file.read_text(encoding="utf-8") for file in files)


def text_batches(text: Callable[[], str], rows: int) -> list[dict[str, torch.Tensor]]:
    """Disjoint batches of a text, in an order that is always the same."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    ids = torch.tensor(tokenizer(text(), verbose=False)["input_ids"])
    chunks = ids[: ids.numel() // (rows * TOKENS) * rows * TOKENS].view(-1, rows, TOKENS)
    order = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": chunks[i], "labels": chunks[i].clone()} for i in order.tolist()]
