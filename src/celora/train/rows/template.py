"""Finds the row that a chat template refuses. The template's own error does not say which row it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def refused_row(
    rows: Iterable[Mapping[str, Any]], tokenizer: Any, template: str | None = None
) -> tuple[int, Exception] | None:
    """The number (from 1) of the first row that the template refuses, and its exception; None if it takes all.

    `template`: None for the tokenizer's own.
    """
    for number, row in enumerate(rows, 1):
        try:
            for messages, prompt in _conversations(row):
                tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
                )
        except Exception as error:  # jinja2's, or any that the template's own expressions raise
            return number, error
    return None


def _conversations(row: Mapping[str, Any]) -> list[tuple[list[Any], bool]]:
    """The conversations that SFTTrainer renders for a row, each with whether it adds a generation prompt."""
    if isinstance(prompt := row.get("prompt"), list):
        return [(prompt, True), (prompt + row["completion"], False)]
    return [(row["messages"], False)] if "messages" in row else []
