"""Which row a chat template refuses: what templates raise, about roles and their order, names none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def refused_row(
    rows: Iterable[Mapping[str, Any]], tokenizer: Any, template: str | None = None
) -> tuple[int, Exception] | None:
    """The number, from 1, of the first row that the template refuses, and what it says; None if it takes them all.

    `template` is the tokenizer's own if None.
    """
    for number, row in enumerate(rows, 1):
        try:
            for messages, prompt in _conversations(row):
                tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
                )
        except Exception as error:  # jinja2's, or whatever the template's own arithmetic comes to
            return number, error
    return None


def _conversations(row: Mapping[str, Any]) -> list[tuple[list[Any], bool]]:
    """What SFTTrainer renders of a row, and whether an answer is to follow it."""
    if isinstance(prompt := row.get("prompt"), list):
        return [(prompt, True), (prompt + row["completion"], False)]
    return [(row["messages"], False)] if "messages" in row else []
