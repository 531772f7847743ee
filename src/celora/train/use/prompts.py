"""Answers many prompts: reads rows, answers them in batches, and writes them as JSON lines.

The output file is always complete JSON lines. celora replaces it as a whole, about every 30 seconds, and when the
command ends or is stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from celora.errors import CELoraError
from celora.files import json_lines, write_text
from celora.train.rows.data import SHAPES, check_messages, check_text, fitting, holds, instruction
from celora.train.rows.places import local_files
from celora.train.rows.readers import READERS, fail
from celora.train.use.generation import Prompt, Sampling, answers, check_length
from celora.train.use.trained import Trained

GENERATED, BY_BASE = "generated", "generated_by_base"
_SAVE_S = 30.0
_EXPECTED = "expected a row with prompt, messages, instruction (+ input) or text"


def prompt_files(source: Path) -> list[Path]:
    """The files that prompts are read from: of a folder, those of its test split."""
    return local_files(source, "test" if source.expanduser().is_dir() else "train")


def load_prompts(
    source: Path, *, limit: int | None = None, text_field: str | None = None
) -> list[tuple[dict[str, Any], Prompt]]:
    """The rows of a file or folder, and the prompt of each row.

    Rows of training data work unchanged: the answer in them is left out of the prompt. The prompt is the messages
    without the assistant's last ones, or the columns `prompt`, `instruction` and `input`, or `text`. Of several, one
    with its answer beside it comes first, then `text_field`: the column that a run was trained on as `text`.

    Raises:
        CELoraError: the file cannot be read, or a row has no prompt. The message names file and line.
    """
    placed = (pair for file in prompt_files(source) for pair in READERS[file.suffix.lower()](file))
    found = [(row, asked_in(place, row, text_field)) for place, row in islice(placed, limit)]
    if not found:
        raise CELoraError(f"{str(source)!r}: no rows; {_EXPECTED}")
    return found


def asked_in(place: str, row: Any, text_field: str | None = None) -> Prompt:
    """The prompt of a row; see `load_prompts`."""
    if not isinstance(row, dict):
        fail(place, f"no object; {_EXPECTED}")
    if taken := {GENERATED, BY_BASE} & row.keys():
        fail(place, f"the column {min(taken)!r} is where the answer goes; rename it")
    column = _asking_column(row, text_field)
    if holds(row.get("tools")) and isinstance(row.get(column), list):
        fail(place, "'tools' are not shown to the model here, so it could not call them; leave such rows out")
    if column == "messages":
        messages = check_messages(place, "messages", row["messages"])
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            fail(place, "no message asks anything: all are the assistant's")
        return messages
    if column == "prompt":
        check: Callable[[str, str, Any], Prompt] = check_messages if isinstance(row["prompt"], list) else check_text
        return check(place, "prompt", row["prompt"])
    if column == "instruction":
        return instruction(place, row)
    if column is None:
        fail(place, f"columns {', '.join(map(repr, row)) or '(none)'}; {_EXPECTED}")
    return check_text(place, column, row[column])


def _asking_column(row: dict[str, Any], text_field: str | None) -> str | None:
    """The column that asks: one with its answer, the run's own text, or any that is there, in the order of `SHAPES`."""
    asking = {shape: columns[0] for shape, columns in SHAPES.items()}
    whole = [asking[shape] for shape in fitting(row) if shape != "text"]
    order = [*whole, *filter(None, [text_field]), *asking.values()]
    return next((column for column in order if row.get(column) is not None), None)


def answered_rows(output: Path, rows: Sequence[dict[str, Any]], *, base: bool) -> list[dict[str, Any]]:
    """The rows that an earlier call has written to `output`; empty if there are none.

    Raises:
        CELoraError: they are not the answers to the first of these rows.
    """
    if not output.is_file():
        return []
    earlier = [row for _, row in READERS[".jsonl"](output)]
    own = {GENERATED, BY_BASE} if base else {GENERATED}
    for number, row in enumerate(earlier):
        given = {key: value for key, value in row.items() if key not in own} if isinstance(row, dict) else None
        if number >= len(rows) or given != json.loads(json_lines([rows[number]])) or not own <= row.keys():
            raise CELoraError(
                f"row {number + 1} of {str(output)!r} is no answer to row {number + 1} of the data, so it cannot be "
                "resumed; --overwrite begins anew"
            )
    return earlier


def answer_all(
    trained: Trained,
    rows: Sequence[tuple[dict[str, Any], Prompt]],
    sampling: Sampling,
    *,
    batch: int,
    base: bool = False,
    earlier: Sequence[dict[str, Any]] = (),
    output: Path | None = None,
    say: Callable[[int, list[dict[str, Any]]], object] = lambda done, new: None,
) -> list[dict[str, Any]]:
    """Answer the rows that are not in `earlier`, and keep `output` up to date. Returns all answered rows.

    Args:
        batch: how many rows are answered at a time.
        base: also ask the untouched model.
        output: file for the answers. It also gets the answers so far if something stops the command.
        say: called after each batch with the number of answered rows and the new rows.

    Raises:
        CELoraError: the model cannot be given a prompt. Nothing is answered then, and the message names the row.
    """
    for number, (_, prompt) in enumerate(rows[len(earlier) :], len(earlier) + 1):
        try:
            check_length(trained, prompt)
        except CELoraError as error:
            raise CELoraError(f"row {number:,} of the data: {error}") from None
    done, saved = list(earlier), time.monotonic()
    written = len(done)
    try:
        for start in range(len(done), len(rows), batch):
            part = rows[start : start + batch]
            prompts = [prompt for _, prompt in part]
            columns = {GENERATED: answers(trained, prompts, sampling, first=start)}
            if base:
                columns[BY_BASE] = answers(trained, prompts, sampling, base=True, first=start)
            new = [row | {name: texts[i] for name, texts in columns.items()} for i, (row, _) in enumerate(part)]
            done += new
            say(len(done), new)
            if output is not None and time.monotonic() - saved > _SAVE_S:
                _save(output, done)
                written, saved = len(done), time.monotonic()
    finally:
        if output is not None and (len(done) > written or not rows[len(done) :]):
            _save(output, done)
    return done


def _save(output: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(output, json_lines(rows, ascii=False))
