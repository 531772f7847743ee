"""What is wrong with a chat template: the row that it refuses, or that it leaves out what messages say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from celora.errors import CELoraError


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


def check_text_is_rendered(row: Mapping[str, Any], tokenizer: Any) -> None:
    """Raise CELoraError if the chat template renders the conversation in a row without anything that is said in it.

    One that is made for content as a list of parts does so, and refuses nothing.
    """
    messages, prompt = _conversations(row)[-1]
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception:  # `refused_row` names the row
        return
    said, written = [_letters(message["content"]) for message in messages], _letters(rendered)
    if any(said) and not any(letters and letters in written for letters in said):
        raise CELoraError(
            "the chat template leaves out what messages say, as one made for lists of parts does; write another, for "
            "text, into the tokenizer's chat_template.jinja"
        )


def _letters(text: str) -> str:
    """What is left of a text whatever a template does to spaces, signs and capitals."""
    return re.sub(r"[\W_]+", "", text).casefold()


def _conversations(row: Mapping[str, Any]) -> list[tuple[list[Any], bool]]:
    """The conversations that SFTTrainer renders for a row, each with whether it adds a generation prompt."""
    if isinstance(prompt := row.get("prompt"), list):
        return [(prompt, True), (prompt + row["completion"], False)]
    return [(row["messages"], False)] if "messages" in row else []
